"""Which operations run in float32: the value, its classes, and how a model runs under it."""
