"""What tests of loading share."""

import pytest


@pytest.fixture
def upcast_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """UPCAST=1, the hooks in place."""
    from upcast.integrations.transformers import load as ours

    ours.install()
    monkeypatch.setenv("UPCAST", "1")
