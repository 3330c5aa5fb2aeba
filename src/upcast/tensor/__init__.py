"""HalfWeight: a float32 tensor stored in float16, and what each torch function does with it."""
