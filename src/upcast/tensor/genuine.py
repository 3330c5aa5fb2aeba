"""Whether what a fast path stands for is still the library's own code.

A fused forward computes what a function of torch, LitGPT or Transformers computes. That function may be replaced at any
time, and so may everything that it finds by name while it runs: functions of its module, methods of its class, torch's
own. `Originals` collects all of these once per kind of module, and compares them at every call: some dictionary values,
natively.
"""

import dis
import functools
import gc
import sys
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._device import DeviceContext

from upcast.core import messages
from upcast.kernels import native

# What a function of a library may find beside its library's and torch's own: settings, loggers, standard classes.
_PLAIN = ("builtins", "logging", "typing")
_OPERATORS = [f"__{name}__" for name in ("add", "radd", "sub", "mul", "rmul", "truediv", "neg", "matmul", "getitem")]
# Under a name that is not its own: nn.Module's door, and a function in a table of Transformers.
_KNOWN_AS = {"__call__": "_wrapped_call_impl", "sdpa": "sdpa_attention_forward"}
_KNOWN_AS |= {name: f"{name}_experts_forward" for name in ("batched_mm", "grouped_mm")}

Namespace = dict[str, Any]


class Table(NamedTuple):
    """A dictionary of functions that ``module`` keeps."""

    entries: Namespace
    module: str


Root = tuple[type | ModuleType | Table, str]  # and the name of a function there

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


def namespace(owner: type | ModuleType | Table) -> Namespace:
    """Return the dictionary behind a class, a module or a table, to look into."""
    if isinstance(owner, Table):
        return owner.entries
    if not isinstance(owner, type):
        return vars(owner)
    behind_the_proxy: Namespace = gc.get_referents(vars(owner))[0]
    return behind_the_proxy


def _home(owner: type | ModuleType | Table) -> str:
    if isinstance(owner, Table):
        return owner.module
    return owner.__module__ if isinstance(owner, type) else owner.__name__


def bound(module: nn.Module, name: str = "forward") -> Callable[..., Any]:
    """Return the method that ``module`` has by its class, whatever its own ``__dict__`` says."""
    kind = type(module)
    method = next(vars(each)[name] for each in kind.__mro__ if name in vars(each))
    get = getattr(type(method), "__get__", None)
    return method if get is None else get(method, module, kind)  # type: ignore[no-any-return]


def observed() -> bool:
    """Whether a mode of torch sees which functions or operations run; one that says where tensors are made does not."""
    if _dispatch_modes() > 0:
        return True
    return _function_modes() > 0 and not all(map(_places_tensors, torch.overrides._get_current_function_mode_stack()))


def _places_tensors(mode: Any) -> bool:
    return type(mode) is DeviceContext and mode.device.type == "cpu"


class _Entry(NamedTuple):
    """What an owner has under a name, or None; ``own``: it is the library's."""

    owner: Namespace
    name: str
    value: Any
    own: bool
    place: str


class Originals:
    """Functions of libraries, with all that they find by name when they run, as the libraries have them."""

    def __init__(self, roots: Callable[..., Iterable[Root]], kinds: tuple[type, ...]) -> None:
        self._made_by: tuple[Any, ...] = (roots, *kinds)
        self._told = False
        self._foreign: _Entry | None = None
        self._own: tuple[list[Any], list[Namespace], list[str]] = [_NEVER], [{}], [""]
        self._collect()

    def __reduce__(self) -> tuple[Any, ...]:
        return (originals, self._made_by)  # copies share it, and another process collects its own

    def intact(self) -> bool:
        """Whether all of it is the library's own."""
        kept, owners, names = self._own
        return _unchanged(kept, _NO_DICTS, owners, names) or self._look_again()

    def _look_again(self) -> bool:
        """Whether what differs is the library's own as well; what is known not to be is not looked at twice."""
        foreign = self._foreign
        if foreign is not None and foreign.owner.get(foreign.name) is foreign.value:
            return False
        self._collect()
        return self._foreign is None

    def _collect(self) -> None:
        roots, *kinds = self._made_by
        entries = _Search(roots(*kinds)).entries.values()
        self._foreign = next((each for each in entries if not each.own), None)
        if self._foreign is None:
            owners, names = [each.owner for each in entries], [each.name for each in entries]
            self._own = [each.value for each in entries], owners, names  # at once: threads share this
        else:
            self._tell(self._foreign)

    def _tell(self, entry: _Entry) -> None:
        if not self._told:
            self._told = True
            messages.say(f"{entry.place}.{entry.name} was replaced: what stands for it runs unfused as long as it is")


@functools.lru_cache(maxsize=512)
def originals(roots: Callable[..., Iterable[Root]], *kinds: type) -> Originals:
    """Return the `Originals` behind ``roots(*kinds)``, shared by all that ask for the same."""
    return Originals(roots, kinds)


def forwards(*kinds: type) -> list[Root]:
    """Return the forward of each of ``kinds``, as roots."""
    return [(kind, "forward") for kind in kinds]


def calls(*kinds: type) -> list[Root]:
    """As `forwards`, with how a module comes to call it: for modules that are not called."""
    inside = [(nn.Module, "__call__"), (nn.Module, "_call_impl")]
    return [*forwards(*kinds), *inside, *((kind, "__call__") for kind in kinds)]


_unchanged = native.unchanged
_NEVER, _NO_DICTS = object(), list[Namespace]()


# --- what functions find by name --------------------------------------------------------------------------------------


class _Search:
    """All that functions find by name when they run, and what these find."""

    def __init__(self, roots: Iterable[Root]) -> None:
        self.entries: dict[tuple[int, str], _Entry] = {}
        for owner, name in roots:
            self._attribute(owner, name)

    def _attribute(self, owner: type | ModuleType | Table, name: str) -> None:
        """Note what ``owner`` has as ``name``: of a class, with every class that it could inherit it from."""
        for each in owner.__mro__ if isinstance(owner, type) else [owner]:
            new = self._note(each, name)
            value = namespace(each).get(name)
            if value is not None:
                if new and type(value) is FunctionType and owner is not nn.Module:
                    self._function(value, owner)
                return

    def _note(self, owner: type | ModuleType | Table, name: str) -> bool:
        """Note one entry. Return whether it is new, and the library's own."""
        found = namespace(owner)
        if (id(found), name) in self.entries:
            return False
        value = found.get(name)
        own = _of_tensor(value) if owner is torch.Tensor else is_own(value, name, _library(_home(owner)))
        place = owner.__name__ if isinstance(owner, type) else _home(owner)
        self.entries[id(found), name] = _Entry(found, name, value, value is None or own, place)
        return own

    def _function(self, function: FunctionType, owner: Any = None) -> None:
        """Note what ``function``, a method of the class ``owner``, finds."""
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        used, attributes = _names(function.__code__)
        self._globals(function, used, attributes)
        for name in attributes if isinstance(owner, type) else ():
            if any(name in vars(kind) for kind in owner.__mro__ if kind not in nn.Module.__mro__):
                self._attribute(owner, name)
        for name in (*attributes, *_OPERATORS):
            if hasattr(torch.Tensor, name):
                self._note(torch.Tensor, name)

    def _globals(self, function: FunctionType, used: set[str], attributes: set[str]) -> None:
        """Note what is looked up in the function's module, in the modules that this has, and so on."""
        homes = [(sys.modules[function.__globals__["__name__"]], used)]
        for home, names in homes:
            for name in sorted(names & vars(home).keys()):
                value = vars(home)[name]
                new = self._note(home, name)
                if isinstance(value, ModuleType):
                    homes += [] if any(value is each for each, _ in homes) else [(value, attributes)]
                elif new and type(value) is FunctionType and _goes_on(function, value):
                    self._function(value)


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the names that ``code`` looks up in its globals, and those that it looks up in objects."""
    used: set[str] = set()
    attributes: set[str] = set()
    for each in dis.get_instructions(code):
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            used.add(each.argval)
        elif each.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR") and not each.argval.startswith("__"):
            attributes.add(each.argval)
        elif isinstance(each.argval, CodeType):  # a comprehension, or a function inside
            inner = _names(each.argval)
            used, attributes = used | inner[0], attributes | inner[1]
    return used, attributes


def _goes_on(function: FunctionType, value: FunctionType) -> bool:
    """Whether what ``value`` finds counts for ``function``; of torch's own helpers, only torch.nn.functional's."""
    functional = vars(nn.functional)
    if function.__globals__ is functional:
        return False
    return value.__globals__ is functional or _library(value.__module__) != "torch"


# --- whose code it is -------------------------------------------------------------------------------------------------


def is_own(value: Any, name: str, library: str) -> bool:
    """Whether ``value``, found as ``name`` in ``library``, is its own or torch's, and no other that was put there."""
    kind = type(value)
    if kind is FunctionType:
        return _is_own_function(value, name, library)
    if kind is BuiltinFunctionType:
        return _alike(value.__name__, name)
    if issubclass(kind, ModuleType):
        return sys.modules.get(value.__name__, value) is value
    if kind.__module__ == "torch._ops":  # an operation that a library registered
        return bool(value.__name__ == name)
    if issubclass(kind, type):
        home = _library(value.__module__)
        return home in (library, "torch") or home in sys.stdlib_module_names
    if kind is property:
        return _is_own_function(value.fget, name, library)
    if kind is functools._lru_cache_wrapper:
        return is_own(value.__wrapped__, name, library)
    return not callable(value) and _library(kind.__module__) in (library, "torch", *_PLAIN)


def _is_own_function(function: Any, name: str, library: str) -> bool:
    """Whether a function was defined, under this name, by the file of a module of ``library``, or of torch."""
    if type(function) is not FunctionType or not _alike(function.__name__, name):
        return False
    home = sys.modules.get(function.__globals__.get("__name__", ""))
    if home is None or vars(home) is not function.__globals__ or _library(home.__name__) not in (library, "torch"):
        return False
    if function.__code__.co_filename != getattr(home, "__file__", None):
        return False
    inside = function.__dict__.get("__wrapped__")  # a decorator of torch's around another's function is the user's
    return inside is None or (is_own(inside, name, library) and _library(inside.__module__) == _library(home.__name__))


def _alike(own_name: str, name: str) -> bool:
    return own_name.strip("_") in (name.strip("_"), _KNOWN_AS.get(name, name).strip("_"))


def _of_tensor(method: Any) -> bool:
    """Whether a method of torch.Tensor is torch's, which has several under the names of others."""
    if type(method) is FunctionType:
        return _library(method.__module__) == "torch"
    return type(method).__module__ == "builtins"


def _library(module: str | None) -> str:
    return (module or "").partition(".")[0]
