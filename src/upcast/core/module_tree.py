"""The modules of a model, in torch's order; its own nested generators take several times as long on deep models."""

from torch import nn


def named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ``root.named_modules()`` gives: each module once, by the first of its names."""
    found: dict[nn.Module, str] = {}
    waiting = [("", root)]
    while waiting:
        name, module = waiting.pop()
        if module in found:
            continue
        found[module] = name
        prefix = f"{name}." if name else ""
        children = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
        waiting += reversed(children)
    return [(name, module) for module, name in found.items()]


def modules(root: nn.Module) -> list[nn.Module]:
    """Return what ``root.modules()`` gives: each module once."""
    found: dict[nn.Module, None] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found)
