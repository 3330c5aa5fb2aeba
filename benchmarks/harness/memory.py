"""How much memory this process holds, and held at most, as the Linux kernel counts it."""

from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # man 5 proc: resets VmHWM to the current VmRSS


def supported() -> bool:
    """Whether this system can tell: Linux with a writable `clear_refs`."""
    return STATUS.exists() and CLEAR_REFS.exists()


def resident_bytes() -> int:
    """Bytes in memory now (VmRSS): anonymous pages and mapped file pages that were touched."""
    return _field("VmRSS")


def peak_bytes() -> int:
    """The largest `resident_bytes` since the process began or `reset_peak` (VmHWM)."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Begin a new peak at the present level."""
    CLEAR_REFS.write_text(RESET_PEAK)


def _field(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no field {name}; memory figures need it. Use a Linux kernel with procfs.")
