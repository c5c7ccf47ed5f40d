"""Commands that read as a paragraph: `python -m trainers.train`, `python -m trainers.evaluate`."""

import commands.quiet  # noqa: F401  before anything that imports TensorFlow
