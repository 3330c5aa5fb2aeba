"""Ordinary programs that know nothing of upcast: run as they are and with UPCAST=1, they print the same."""
