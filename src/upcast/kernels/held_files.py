"""Files that stay mapped while others may write to them: the native part of checkpoint/mapped.py, bind_files.cpp."""

from upcast.kernels import native


def hold_file(descriptor: int, size: int, places: list[tuple[int, int]]) -> tuple[int, int, list[int]]:
    """Map a file of so many bytes so that no writer reaches what lies at ``places`` (offset, size).

    Returns (0, the address, a part for each place, to be given to `drop_part`), and the descriptor is the mapping's; or
    (an error number, 0, None).
    """
    flat = [edge for place in places for edge in place]
    held: tuple[int, int, list[int]] = native._native.hold_file(descriptor, size, flat)
    return held


def drop_part(part: int) -> None:
    """Say that nobody uses this part of a file any more; the mapping goes with its last part."""
    native._native.drop_part(part)


def own(start: int, end: int) -> bool:
    """Put memory of ours, with the same bytes, in the place of mapped pages; False where the system cannot.

    The caller sees to it that they stay mapped, and mapped from a file, until this returns.
    """
    return native.available() and bool(native._native.own(start, end))


def before_fork() -> None:
    """Let nobody change what is held, until `after_fork`."""
    native._native.before_fork()


def after_fork(is_child: bool) -> None:
    """Go on; in a child, watch over what it has inherited."""
    native._native.after_fork(is_child)
