"""Side-by-side measurements against peers; each prints JSON lines. Not installed."""

import commands.quiet  # noqa: F401  before anything that imports TensorFlow
