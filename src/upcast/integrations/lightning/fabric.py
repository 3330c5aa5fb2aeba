"""Lightning Fabric: upcast as its precision. ``L.Fabric(accelerator="cpu", plugins=upcast.FabricPrecision())``."""

from collections.abc import Sequence

from lightning.fabric.plugins.precision import Precision
from torch import nn

from upcast.api import patch as upcast_patch
from upcast.tensor.half_weight import HalfWeight


class FabricPrecision(Precision):  # type: ignore[misc]
    """Patches every module that Fabric sets up: frozen weights in float16, math and what learns in float32.

    ``fabric.setup(model, optimizer)`` takes an optimizer of what learns alone, since frozen weights are replaced:
    ``[p for p in model.parameters() if p.requires_grad]``. A module that is patched already is taken as it is.

    Args:
        keep: as for `upcast.patch`.
        kv_cache: as for `upcast.patch`.
        trainable: as for `upcast.patch`.
        guard: as for `upcast.patch`.

    Examples:
        >>> import lightning
        >>> fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=upcast.FabricPrecision())
        >>> model = fabric.setup_module(torch.nn.Linear(8, 4))
        >>> model(torch.randn(1, 8)).dtype
        torch.float32
    """

    # Fabric compares this with its own precision= argument; to the math, that is what it is.
    precision = "32-true"

    def __init__(
        self,
        *,
        keep: Sequence[str] = (),
        kv_cache: str = "float16",
        trainable: Sequence[str] = (),
        guard: bool = False,
    ) -> None:
        self.keep, self.kv_cache, self.trainable, self.guard = keep, kv_cache, trainable, guard

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Patch ``module`` in place and return it; Fabric calls this in ``setup`` and ``setup_module``.

        Raises:
            UpcastError: as `upcast.patch`.
        """
        if any(isinstance(parameter, HalfWeight) for parameter in module.parameters()):
            return module
        return upcast_patch(module, keep=self.keep, kv_cache=self.kv_cache, trainable=self.trainable, guard=self.guard)
