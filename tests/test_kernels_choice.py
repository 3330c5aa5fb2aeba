"""Which kernels run: by name, and never silently another."""

import pytest

import upcast
from upcast import kernels


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(upcast.UpcastError, match="kernels 'fast'; it must be one of auto, native, portable"):
        kernels.use("fast")
