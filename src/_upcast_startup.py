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
    "transformers.pipelines.base",
    "diffusers.models.modeling_utils",
)
_FIRST = b'"""float16 weights, float32 math'  # of our package's __init__.py
_REMEDY = "pip uninstall upcast && pip install --force-reinstall --no-deps torch-upcast"
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
        if stranger := taken():
            raise ImportError(stranger)
        from upcast.integrations import activation

        activation.activate(module)
    except Exception as error:
        if str(error) not in _failures:  # one library has several modules that we wait for
            _failures.add(str(error))
            _warn(f"upcast is not active for {module.__name__}: {error}")


def taken() -> str | None:
    """Say who took our place, where something else is imported as ``upcast``: PyPI has a project of that name."""
    import importlib.util

    spec = importlib.util.find_spec("upcast")
    if spec is None or (spec.origin and _is_ours(spec.origin)):
        return None
    where = spec.origin or ", ".join(spec.submodule_search_locations or ())
    return f"'import upcast' finds another project of that name ({where}). Run: {_REMEDY}"


def _is_ours(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_FIRST)) == _FIRST
    except OSError:  # in an archive, for one: not to be told apart
        return True


def command() -> int:
    """Run the command line."""
    if stranger := taken():
        sys.stderr.write(f"upcast: {stranger}\n")
        return 2
    from upcast.cli.main import main

    return main()


def _warn(message: str) -> None:
    """Warn; where warnings are errors, say it: a hook of ours raises nothing in somebody's program."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=1)
    except RuntimeWarning:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error, or a closed one
            sys.stderr.write(f"upcast: {message}\n")
