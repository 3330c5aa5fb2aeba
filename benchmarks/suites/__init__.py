"""What `run.py --suite` measures."""
