"""The one exception that users of upcast need to know, and what a fast path is told."""


class UpcastError(ValueError):
    """Something upcast refuses, with what was found, the rule and the remedy.

    Examples:
        >>> try:
        ...     upcast.unpatch(torch.nn.Linear(8, 4))
        ... except upcast.UpcastError as error:
        ...     print(error)
        this Linear is not patched by upcast; only a patched model can be. Call upcast.patch(model) first.
    """


class KernelError(UpcastError):
    """Something that a kernel does not take; nothing was written. Torch has a result for it, or an error of its own."""


def describe(error: BaseException) -> str:
    """Return an error in one line: an UpcastError says enough, of others the kind is told too."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UpcastError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
