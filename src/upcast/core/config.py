"""The environment, read in one place and strictly: an unknown value raises and lists the valid ones."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from upcast.core.errors import UpcastError

ON = ("1", "true", "on", "yes")
OFF = ("", "0", "false", "off", "no")
KERNELS = ("auto", "native", "portable")
ISAS = ("auto", "x86-64", "x86-64-v3", "x86-64-v4", "x86-64-v4-amx", "x86-64-v4-amx-fp16", "aarch64")
KV_CACHES = ("float16", "float32")
STORAGES = ("float16", "packed", "auto", "float32")
VERBOSITY = ("0", "1", "2")
POLICIES = ("safe", "sensitive", "none")  # those that have a name

CHECKS: dict[str, Callable[[str], object]] = {}
"""Variable -> what raises UpcastError on a value that is none, where valid values cannot be listed."""


@dataclass(frozen=True)
class Variable:
    """One environment variable: the values it takes, the value when unset, and what it does."""

    name: str
    values: tuple[str, ...]
    default: str
    meaning: str
    checked: bool = False  # by one of CHECKS; then ``values`` are examples
    free: bool = False  # any text is a value


VARIABLES = (
    Variable("UPCAST", ON + OFF, "0", "patch what LitGPT, Transformers and Diffusers load, with no code change"),
    Variable("UPCAST_POLICY", POLICIES, "safe", "which op classes run in float32", checked=True),
    Variable("UPCAST_KERNELS", KERNELS, "auto", "native: compiled kernels or an error; portable: torch's own ops"),
    Variable("UPCAST_ISA", ISAS, "auto", "the instruction set of the native kernels, at most what the machine has"),
    Variable(
        "UPCAST_TUNING",
        (),
        "",
        "the file of what upcast tune measured here, or off",
        free=True,
    ),
    Variable(
        "UPCAST_KV_CACHE",
        KV_CACHES,
        "float16",
        "the KV cache of LitGPT and Transformers; float32: twice the bytes, exact",
    ),
    Variable(
        "UPCAST_STORAGE",
        STORAGES,
        "float16",
        "how weights are stored; packed: those of a bfloat16 checkpoint in 12 bits, exact",
    ),
    Variable("UPCAST_KEEP", (), "", "patterns of what stays in float32, such as lm_head,*.gate", free=True),
    Variable("UPCAST_TRAINABLE", (), "", "patterns of what learns and stays in float32, such as classifier", free=True),
    Variable("UPCAST_VERBOSE", VERBOSITY, "1", "0: silent; 1: one line per patched model; 2: the whole plan"),
)


@dataclass(frozen=True)
class Config:
    """What the environment asks for."""

    enabled: bool
    policy: str
    kernels: str
    isa: str
    kv_cache: str | None  # None: as the policy says
    verbose: int
    keep: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    storage: str | None = None  # as the policy says


@dataclass(frozen=True)
class Rank:
    """Which of several processes this one is, as torchrun says it; ``served``: torchrun itself holds the store."""

    rank: int
    ranks: int
    address: str
    port: int
    served: bool
    attempt: str


def read(environ: Mapping[str, str] = os.environ) -> Config:
    """Return the environment's settings.

    Raises:
        UpcastError: a variable has a value that is not one of its valid ones.
    """
    values = {variable.name: _value(variable, environ) for variable in VARIABLES}
    return Config(
        enabled=values["UPCAST"] in ON,
        policy=values["UPCAST_POLICY"],
        kernels=values["UPCAST_KERNELS"],
        isa=values["UPCAST_ISA"],
        kv_cache=values["UPCAST_KV_CACHE"] if environ.get("UPCAST_KV_CACHE") else None,
        storage=values["UPCAST_STORAGE"] if environ.get("UPCAST_STORAGE") else None,
        verbose=int(values["UPCAST_VERBOSE"]),
        keep=_listed(values["UPCAST_KEEP"]),
        trainable=_listed(values["UPCAST_TRAINABLE"]),
    )


def _listed(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def rank_of(environ: Mapping[str, str] = os.environ) -> Rank:
    """Return the place that torchrun's variables give this process; without them it is alone.

    Raises:
        UpcastError: a variable is missing or is not a number, or the rank is not one of the ranks.
    """
    ranks, rank = (_number(name, environ, alone) for name, alone in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if not 0 <= rank < ranks:
        raise UpcastError(f"RANK={rank} of WORLD_SIZE={ranks}; ranks count from 0. Start the processes with torchrun.")
    if ranks == 1:
        return Rank(0, 1, "", 0, False, "0")
    if "MASTER_ADDR" not in environ:
        raise UpcastError(f"WORLD_SIZE={ranks} without MASTER_ADDR; ranks meet there. Start them with torchrun.")
    port = _number("MASTER_PORT", environ, "29500")
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Rank(rank, ranks, environ["MASTER_ADDR"], port, served, environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _number(name: str, environ: Mapping[str, str], default: str) -> int:
    value = environ.get(name, default)
    if not value.isdecimal() or len(value) > 9:
        raise UpcastError(
            f"{name}={value[:40]!r} in the environment; it must be a number of at most 9 digits. "
            "Start the processes with torchrun."
        )
    return int(value)


def shown(variable: Variable, environ: Mapping[str, str] = os.environ) -> str:
    """Return a variable's value for people: as it is set, or its default."""
    value = environ.get(variable.name)
    return f"{variable.default!r} (default)" if value is None else repr(value)


def _value(variable: Variable, environ: Mapping[str, str]) -> str:
    value = environ.get(variable.name, variable.default).strip()
    if variable.free:
        return value
    if variable.checked and value:
        return _checked(variable, value)
    value = value.lower()
    if value in variable.values:
        return value
    valid = ", ".join(repr(v) for v in variable.values if v)
    raise UpcastError(
        f"{variable.name}={value!r} in the environment; it takes one of {valid} ({variable.meaning}). "
        f"Correct it, or unset it for the default {variable.default!r}."
    )


def _checked(variable: Variable, value: str) -> str:
    try:
        CHECKS[variable.name](value)
    except UpcastError as error:
        raise UpcastError(f"{variable.name}={value[:200]!r} in the environment: {error}") from None
    return value
