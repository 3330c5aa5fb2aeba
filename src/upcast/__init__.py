"""float16 weights, float32 math, no NaNs."""
