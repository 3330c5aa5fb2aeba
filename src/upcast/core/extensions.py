"""What upcast does beyond torch for the models of one library: an `Extension`, which registers itself.

The core asks what is registered and names no library. An integration is a subclass and one call of `register`:

    class MyLibrary(Extension):
        name = "mylibrary"

        def install(self, root, kv_cache):
            for module in module_tree.modules(root):
                if isinstance(module, mylibrary.Norm):
                    forward_override.push(module, MyNorm(module))  # MyNorm.owner = "mylibrary": taken away by it

    register(MyLibrary())

One that is dear to import may wait until its library is there: ``expect("mylibrary", "my_integration.install")``.
"""

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import FrameType
from typing import ClassVar

from torch import nn


class Extension:
    """What is special about the models of one library. Whatever a subclass does not say has no effect.

    Attributes:
        name: the library's, for messages; also the ``owner`` of its forwards, which are taken away by it.
        reports_sizes: function -> its module, of those that add up memory by dtype: they are told the dtype at rest.
        copies_to_train: modules whose code copies a weight to train the copy, or to take numbers that have learned.
    """

    name: ClassVar[str]
    reports_sizes: ClassVar[Mapping[str, str]] = {}
    copies_to_train: ClassVar[frozenset[str]] = frozenset()

    def unwrap(self, model: object) -> object:
        """Return what is inside one of the library's wrappers, or ``model`` itself.

        Raises:
            UpcastError: there is nothing inside yet.
        """
        return model

    def only_generates(self, root: nn.Module) -> bool:
        """Whether ``root`` is there for inference, though it says that it is in training mode."""
        return False

    def install(self, root: nn.Module, kv_cache: str) -> None:
        """Give the library's modules in ``root`` fused forwards (`forward_override.push`) and caches of that dtype."""

    def install_caches(self, root: nn.Module, kv_cache: str) -> None:
        """As `install`, but under a policy other than safe: caches only, which no fused forward reads."""

    def remove(self, root: nn.Module) -> None:
        """Take away what `install` gave beside forwards, and what the model has made with it since."""

    def remarks(self, root: nn.Module) -> Iterable[str]:
        """Return lines for the foot of the plan: what keeps its own, slower forward, and why."""
        return ()

    def doors(self, root: nn.Module) -> Iterable[nn.Module]:
        """Return modules inside ``root`` that the library calls by themselves, past the forward of ``root``."""
        return ()

    def appended(self, state: object) -> frozenset[str]:
        """Return the fields of a cache that a step only replaces, or writes where the same step would write again.

        The guard need not copy those before each step. Of everything else it keeps a copy.
        """
        return frozenset()


_registered: dict[str, Extension] = {}
_expected: dict[str, str] = {}
_reports_sizes: dict[str, set[str]] = {}


def register(extension: Extension) -> None:
    """Have upcast ask ``extension``; another one of the same name gives way."""
    _registered[extension.name] = extension
    for function, module in extension.reports_sizes.items():
        _reports_sizes.setdefault(function, set()).add(module)


def expect(library: str, module: str) -> None:
    """Have ``module`` imported, which registers an extension, by whoever asks once ``library`` is imported."""
    _expected[library] = module


def registered() -> tuple[Extension, ...]:
    """Return the extensions, in the order in which they came."""
    for library in [library for library in list(_expected) if library in sys.modules]:  # a thread may take one out
        module = _expected.get(library)
        if module is not None:  # else another thread has done it since
            import_module(module)
            _expected.pop(library, None)
    return tuple(_registered.copy().values())  # copied in one step, also without a GIL


def remarks(root: nn.Module) -> tuple[str, ...]:
    """Return what all extensions have to say about ``root``."""
    return tuple(line for each in registered() for line in each.remarks(root))


def reports_sizes(caller: FrameType) -> bool:
    """Whether the caller adds up memory by dtype."""
    return caller.f_globals.get("__name__") in _reports_sizes.get(caller.f_code.co_name, ())


def copies_to_train(module: str) -> bool:
    """Whether a copy that code of that module makes of a weight is to learn."""
    return any(module in each.copies_to_train for each in registered())
