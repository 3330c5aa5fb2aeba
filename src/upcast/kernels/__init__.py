"""Kernels: the native library, its loader, and the reference twins in plain PyTorch."""
