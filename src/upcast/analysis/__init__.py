"""A model under one policy after another: diagnose, search, ablate, certify."""
