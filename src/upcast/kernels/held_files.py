"""Files that stay mapped while others may write to them: the native part of checkpoint/mapped.py, bind_files.cpp."""

import weakref

from upcast.kernels import native


def hold_file(descriptor: int, size: int, places: list[tuple[int, int]]) -> tuple[int, int, list[int]]:
    """Map a file of so many bytes so that no writer reaches what lies at ``places`` (offset, size).

    Returns (0, the address, a part for each place, to be given to `drop_with`), and the descriptor is the mapping's; or
    (an error number, 0, None).
    """
    flat = [edge for place in places for edge in place]
    held: tuple[int, int, list[int]] = native._native.hold_file(descriptor, size, flat)
    return held


def drop_with(memory: object, part: int) -> None:
    """Have this part of a file go with ``memory``, which nobody uses then; the mapping goes with its last part.

    No line of Python runs then: an interruption there would be lost, and the part would stay.
    """
    weakref.finalize(memory, native._native.drop_part, part).atexit = False


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
