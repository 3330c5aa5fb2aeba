"""The one exception that users of upcast need to know."""


class UpcastError(ValueError):
    """Something upcast refuses, with what was found, the rule and the remedy."""
