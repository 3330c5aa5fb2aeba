"""Start-up hook of upcast, called by Python's site through upcast.pth (from Python 3.15 on: upcast.start).

Top-level and standard library only, so that it costs nothing: while UPCAST is unset nothing is imported, and with
it set torch is not, until the program itself imports one of the libraries below.
"""

import contextlib
import os
import sys
import warnings
from types import ModuleType

TARGETS = (
    "litgpt.api",
    "litgpt.chat.base",
    "litgpt.finetune.adapter",
    "litgpt.finetune.adapter_v2",
    "litgpt.finetune.lora",
    "litgpt.finetune.lora_legacy",
    "litgpt.generate.base",
    "litgpt.generate.full",
    "litgpt.generate.speculative_decoding",
    "litgpt.generate.adapter",
    "litgpt.generate.adapter_v2",
    "litgpt.generate.sequentially",
    "litgpt.generate.tp",
    "transformers.modeling_utils",
    "diffusers.models.modeling_utils",
)
_OFF = ("", "0", "false", "off", "no")
_started: list[bool] = []
_failures: set[str] = set()


def start() -> None:
    """Arrange for the loaders of the libraries in TARGETS to be patched when these are imported, if UPCAST is on."""
    if os.environ.get("UPCAST", "").strip().lower() in _OFF or _started:
        return
    _started.append(True)  # site may read a .pth file twice
    try:
        import wrapt

        for target in TARGETS:
            wrapt.register_post_import_hook(_activate, target)
    except Exception as error:  # a broken one fails in any way, and site would print a traceback at every start
        why = f"{type(error).__name__}: {error}"
        _warn(f"UPCAST is set, but wrapt cannot be used ({why}): nothing is patched. Install upcast again.")


def started() -> bool:
    """Return whether the hooks are in place."""
    return bool(_started)


def _activate(module: ModuleType) -> None:
    """Never let a failure of ours break the import of somebody's library: warn, once."""
    try:
        from upcast.integrations import activation

        activation.activate(module)
    except Exception as error:
        if str(error) not in _failures:  # one library has several modules that we wait for
            _failures.add(str(error))
            _warn(f"upcast is not active for {module.__name__}: {error}")


def _warn(message: str) -> None:
    """Warn; where warnings are errors, say it: a hook of ours raises nothing in somebody's program."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=1)
    except RuntimeWarning:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error, or a closed one
            sys.stderr.write(f"upcast: {message}\n")
