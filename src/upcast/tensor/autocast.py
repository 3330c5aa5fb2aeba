"""What torch.autocast asks of products with a weight that is stored in float16.

Under autocast torch rounds both factors of a product to bfloat16 or float16 and returns that dtype, and a program's own
code relies on it. Here a product is computed in float32 as ever, from factors as they are, and only its result is
rounded: the dtype that the program expects, with a smaller error. What is fused steps aside, since the operations in
between change their dtypes too.
"""

import torch
from torch import Tensor

enabled = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any kind of device: one call into C, for the fused forwards and the shortest ways."""


def active() -> bool:
    """Return whether autocast is on for the CPU; torch.compile knows this question."""
    return torch.is_autocast_enabled("cpu")


def rounded(product: Tensor) -> Tensor:
    """Return a float32 ``product`` in the dtype that autocast gives products on the CPU; as it is where that is off."""
    if not active():
        return product
    return product.to(torch.get_autocast_dtype("cpu"))
