"""Moving a patched model off the CPU is refused with the remedy, and changes nothing."""

from typing import Any

import pytest
import torch

import upcast
from tests.conftest import assert_patched


@pytest.mark.parametrize("convert", [{"device": "meta"}, {"device": "meta", "dtype": torch.float32}])
def test_moving_to_another_device_is_refused_and_changes_nothing(convert: dict[str, Any]) -> None:
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.Linear(129, 7)).eval())
    x = torch.randn(5, 33)
    want = model(x)
    with pytest.raises(upcast.UpcastError, match=r"to meta.*upcast\.unpatch\(model\) first"):
        model.to(**convert)
    assert_patched(model)
    assert torch.equal(model(x), want)
    assert upcast.unpatch(model).to("meta")[0].weight.is_meta  # the remedy it names
