"""How results are judged: against float64, by the error PyTorch's own float32 makes."""

import torch
from torch import Tensor

# PyTorch's own error can be zero by luck; nobody can be asked for less than a few units in the last place.
FLOOR = 3e-7


def error(result: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN and infinities must agree in place and sign."""
    assert result.shape == exact.shape
    assert result.dtype == torch.float32
    finite = exact.isfinite()
    torch.testing.assert_close(result[~finite].double(), exact[~finite], equal_nan=True)
    difference = (result.double() - exact)[finite].norm()
    scale = exact[finite].norm()
    return float(difference / scale) if scale > 0 else float(difference)


def check(result: Tensor, reference: Tensor, exact: Tensor, limit: float = 2e-6) -> None:
    """At most `limit`, and at most twice the error of the float32 reference plus a floor."""
    ours = error(result, exact)
    assert ours <= min(limit, max(FLOOR, 2 * error(reference, exact))), (ours, error(reference, exact))
