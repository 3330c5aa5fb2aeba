"""Other programs that run the same weights."""
