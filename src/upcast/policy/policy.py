"""Policies: which classes of operations run in float32, as one value that reads and prints as one string.

safe                                      every class (the default)
sensitive                                 norm+softmax+scores+residual: the textbook list
none                                      nothing: plain float16, as ``model.half()``
norm+residual+linear                      any set
none; transformer.h.11.*=safe             other classes in some modules; of several that match, the last counts
safe; kv_cache=float32; storage=packed    how caches and weights are stored
"""

import difflib
import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from upcast.core import config, pattern, text_file
from upcast.core.errors import UpcastError

CLASSES = {
    "linear": "products with a weight: linear, convolution, embedding; what they accumulate and what they give",
    "norm": "normalisation, and what it is made of: powers, roots, means, sums",
    "softmax": "softmax, exponentials and logarithms, losses",
    "scores": "products of two activations: attention as a whole, or its matmuls",
    "residual": "adding two activations of one shape",
    "activation": "activation functions, and products of two activations of one shape (gates)",
}

ALL = frozenset(CLASSES)
PRESETS = {
    "safe": ALL,
    "sensitive": frozenset({"norm", "softmax", "scores", "residual"}),
    "none": frozenset[str](),
}
POLICIES = {
    "safe": "every operation runs in float32; only weights at rest are float16",
    "sensitive": "norm, softmax, scores and residual run in float32, the rest in float16",
    "none": "plain float16, as model.half()",
}
DTYPES = ("float16", "float32")
STORAGES = {
    "float16": "16 bits: rounded to float16",
    "packed": "12 bits, exact, where a weight has bfloat16's numbers; else float16",
    "auto": "as packed, where that is as fast as it can be: a weight with many unusual numbers goes to float16",
    "float32": "32 bits: nothing is rounded",
}
_SETTINGS = {"kv_cache": DTYPES, "storage": tuple(STORAGES)}
LONGEST = 1 << 16  # characters of a policy
LARGEST = 1 << 22  # bytes of a saved one, which may tell how it was found


@dataclass(frozen=True)
class Policy:
    """Which op classes are upcast to float32, where, and how weights and caches are stored.

    Attributes:
        classes: the op classes (keys of CLASSES) that run in float32.
        overrides: (module pattern, classes) pairs that replace ``classes`` inside matching modules; the last counts.
        kv_cache: how keys and values are kept, ``"float16"`` or ``"float32"``.
        storage: how weights are stored, one of STORAGES: ``"float16"``, ``"packed"``, ``"auto"`` or ``"float32"``.

    Examples:
        >>> policy = upcast.Policy.parse("sensitive; lm_head=safe")
        >>> sorted(policy.at("model.layers.0"))
        ['norm', 'residual', 'scores', 'softmax']
        >>> policy.at("lm_head") == upcast.Policy().classes
        True
    """

    classes: frozenset[str] = ALL
    overrides: tuple[tuple[str, frozenset[str]], ...] = ()
    kv_cache: str = "float16"
    storage: str = "float16"

    @staticmethod
    def parse(text: str) -> "Policy":
        """Return the policy that ``text`` says (see the grammar above).

        Raises:
            UpcastError: a part of the text is unknown; the message points at its first character.
        """
        return _parse(text)

    def __str__(self) -> str:
        parts = [show(self.classes), *(f"{where}={show(classes)}" for where, classes in self.overrides)]
        for name in _SETTINGS:
            if getattr(self, name) != "float16":
                parts.append(f"{name}={getattr(self, name)}")
        return "; ".join(parts)

    @property
    def everywhere(self) -> bool:
        """Whether every class is upcast in every module: then nothing has to be intercepted."""
        return self.classes == ALL and all(classes == ALL for _, classes in self.overrides)

    def at(self, module: str) -> frozenset[str]:
        """Return the classes that are upcast in the module of this dotted name."""
        classes = self.classes
        for where, other in self.overrides:
            if pattern.matches(module, where):
                classes = other
        return classes

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the policy as JSON text, and write it to ``path`` if given.

        `from_json` reads the text, ``upcast.patch(model, policy=path)`` the file.
        """
        text = json.dumps({"policy": str(self)}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @staticmethod
    def from_json(text: str) -> "Policy":
        """Return the policy of ``text``, as `to_json` or `upcast.search` wrote it.

        Raises:
            UpcastError: it is no JSON, or holds no policy.
        """
        return _parse(_fields(text, "this text")["policy"])


def show(classes: frozenset[str]) -> str:
    """Return a set of op classes as a policy string has it: a preset's name, or the classes joined by +."""
    named = [name for name, preset in PRESETS.items() if preset == classes]
    return named[0] if named else "+".join(name for name in CLASSES if name in classes)


def check_kv_cache(kv_cache: str) -> None:
    """Raise UpcastError if ``kv_cache`` is none of DTYPES."""
    if kv_cache not in DTYPES:
        raise UpcastError(f"kv_cache={kv_cache!r}; it must be one of {', '.join(DTYPES)}. Use 'float16'.")


def check_storage(storage: str) -> None:
    """Raise UpcastError if ``storage`` is none of STORAGES."""
    if storage not in STORAGES:
        raise UpcastError(f"storage={storage!r}; it must be one of {', '.join(STORAGES)}. Use 'float16'.")


class HasPolicy(Protocol):
    """What `upcast.search` and `upcast.diagnose` return."""

    @property
    def policy(self) -> Policy: ...


Choice = str | Path | Policy | HasPolicy
"""How a user says which policy is meant: as text, as the path of a saved one, or as a value that is or has one."""


@dataclass(frozen=True)
class Stored:
    """What a user chose, with another storage."""

    choice: "Choice"
    storage: str


def stored(choice: "Choice", storage: str | None) -> Any:
    """Return ``choice`` with weights stored as ``storage`` says; None: as the policy says.

    Raises:
        UpcastError: ``storage`` is none of STORAGES.
    """
    if storage is None:
        return choice
    check_storage(storage)
    return Stored(choice, storage)


def of(settings: config.Config) -> Any:
    """Return the policy that the environment asks for."""
    return stored(settings.policy, settings.storage)


def resolve(value: object, *, check: Any = None) -> Policy:
    """Return the policy that a user means: a Policy, a policy string, or the path of a saved one.

    Args:
        value: what the user gave.
        check: called with a saved policy's fields, so that one made for another model can be refused.

    Raises:
        UpcastError: it is none of these; the file is missing or holds no policy.
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, Stored):
        return replace(resolve(value.choice, check=check), storage=value.storage)
    if isinstance(value, Path) or (isinstance(value, str) and value.strip().endswith(".json")):
        fields = read(Path(str(value).strip()))
        if check is not None:
            check(fields)
        return _told_of(value, fields)
    if isinstance(value, str):
        return _parse(value)
    policy = getattr(value, "policy", None)  # what upcast.search and upcast.diagnose return
    if isinstance(policy, Policy):
        if check is not None:
            check({"policy": str(policy), "architecture": getattr(value, "architecture", None)})
        return policy
    raise UpcastError(
        f"policy is a {type(value).__name__}; it must be an upcast.Policy, a policy string or the path of a saved one. "
        "Use policy='safe' when in doubt."
    )


def _told_of(path: str | Path, fields: dict[str, Any]) -> Policy:
    try:
        return _parse(fields["policy"])
    except UpcastError as error:
        raise UpcastError(f"policy file {path}: {error}") from None


def read(path: Path) -> dict[str, Any]:
    """Return the fields of a saved policy."""
    return _fields(text_file.read(path, "policy file", LARGEST), f"policy file {path}")


def _fields(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UpcastError(
            f"{where} is no JSON ({error}); it must be a policy that upcast saved. Save it again."
        ) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("policy"), str):
        raise UpcastError(f"{where} has no entry 'policy' with a policy string; save it with policy.to_json(path).")
    return fields


# --- reading the string -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _parse(text: str) -> Policy:
    if len(text) > LONGEST:
        raise UpcastError(f"a policy of {len(text):,} characters; it has at most {LONGEST:,}. Use fewer patterns.")
    odd = next((at for at, letter in enumerate(text) if not (letter.isprintable() or letter.isspace())), None)
    if odd is not None:
        raise _fault(text, odd, f"{text[odd]!r} cannot be printed", "a policy is text; type it anew")
    parts = [(match.start(), match.group()) for match in re.finditer(r"[^;]+", text) if match.group().strip()]
    if not parts:
        raise _fault(text, 0, "no policy", f"a policy begins with {_valid()}")
    classes = _classes(text, *_stripped(*parts[0]))
    overrides: list[tuple[str, frozenset[str]]] = []
    settings: dict[str, str] = {}
    for start, part in parts[1:]:
        start, part = _stripped(start, part)  # noqa: PLW2901
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise _fault(
                text, start, f"{_short(part)} is not PATTERN=CLASSES", "a module pattern, kv_cache or storage, and ="
            )
        at, value = _stripped(start + len(key) + 1, value)
        key = key.strip()
        if key not in _SETTINGS:
            _check_pattern(text, start, key)
            overrides.append((key, _classes(text, at, value)))
        elif value in _SETTINGS[key]:
            settings[key] = value
        else:
            raise _fault(text, at, f"{key} is {_short(value)}", f"valid are {', '.join(_SETTINGS[key])}")
    return Policy(classes, tuple(overrides), **settings)


def _check_pattern(text: str, start: int, key: str) -> None:
    try:
        pattern.compiled(key)
    except UpcastError as error:
        raise _fault(text, start, "no pattern", str(error).removesuffix(".")) from None


def _stripped(start: int, part: str) -> tuple[int, str]:
    return start + len(part) - len(part.lstrip()), part.strip()


def _classes(text: str, start: int, part: str) -> frozenset[str]:
    found: set[str] = set()
    for raw in part.split("+"):
        word = raw.strip()
        if word not in PRESETS and word not in CLASSES:
            raise _no_class(text, start + len(raw) - len(raw.lstrip()), word)
        found |= PRESETS.get(word, {word})
        start += len(raw) + 1
    return frozenset(found)


def _no_class(text: str, at: int, word: str) -> UpcastError:
    name = re.match(r"\w*", word)
    length = name.end() if name else 0
    if word[:length] in PRESETS or word[:length] in CLASSES:  # a good name, and then something that is no +
        length += len(word[length:]) - len(word[length:].lstrip())
        return _fault(
            text, at + length, f"{_short(word[length:])} follows {word[:length].strip()!r}", f"valid are {_valid()}"
        )
    close = difflib.get_close_matches(word.lower(), [*PRESETS, *CLASSES], n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return _fault(text, at, f"{_short(word)} is no op class", f"{hint}valid are {_valid()}")


def _valid() -> str:
    return f"the presets {', '.join(PRESETS)}, or classes joined by +: {', '.join(CLASSES)}"


def _fault(text: str, at: int, found: str, remedy: str) -> UpcastError:
    """Return the error that shows ``text``, or of a long one the part around character ``at``, and points there."""
    first = at - _SHOWN // 2 if len(text) > 2 * _SHOWN and at > _SHOWN else 0
    part = text[first : first + 2 * _SHOWN]
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in part)
    return UpcastError(
        f"policy {_short(text)}: {found} (character {at + 1}).\n    {line}\n    {' ' * (at - first)}^\n{remedy}."
    )


_SHOWN = 100


def _short(text: str) -> str:
    return repr(text) if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]!r}..."


config.CHECKS["UPCAST_POLICY"] = resolve
