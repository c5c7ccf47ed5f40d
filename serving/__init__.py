"""From a run folder to answers over gRPC: export, serve, ask."""

import commands.quiet  # noqa: F401  before anything that imports TensorFlow
