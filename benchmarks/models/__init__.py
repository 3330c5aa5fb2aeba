"""The models that are measured, and their preparation."""
