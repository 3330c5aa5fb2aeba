"""Lightning Fabric's wrapper around a module that it has set up."""

from torch import nn

from upcast.core.extensions import Extension, register


class FabricModules(Extension):
    """What ``fabric.setup_module`` returns is patched inside."""

    name = "lightning"

    def unwrap(self, model: object) -> object:
        """Return the module that the user gave Fabric."""
        if isinstance(model, nn.Module) and type(model).__name__ == "_FabricModule":
            return model.module
        return model


register(FabricModules())
