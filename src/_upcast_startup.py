"""Start-up hook of upcast, run by site through upcast.pth (or upcast.start from Python 3.15 on)."""


def start() -> None:
    """Do nothing yet."""
