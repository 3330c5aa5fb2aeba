"""What upcast raises."""


class UpcastError(ValueError):
    """Something upcast refuses, with what was found, the rule and the remedy."""
