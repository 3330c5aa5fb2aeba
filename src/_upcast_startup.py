"""Start-up hook of upcast, called by Python's site through upcast.pth (from Python 3.15 on: upcast.start).

Top-level and standard library only, so that it costs nothing: while UPCAST is unset nothing is imported, and with
it set torch is not, until the program itself imports one of the libraries below. Unless UPCAST is switched off,
Transformers learns that a checkpoint whose config names upcast is ours; upcast is imported when one is loaded.
"""

import os
import sys

TYPE_CHECKING = False  # typing itself, and what functions below import, would cost each start some milliseconds
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

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
_QUANTIZERS = "transformers.quantizers.auto"
_FIRST = b'"""float16 weights, float32 math'  # of our package's __init__.py
_REMEDY = "pip uninstall upcast && pip install --force-reinstall --no-deps torch-upcast"
_OFF = ("", "0", "false", "off", "no")
_started: list[bool] = []
_failures: set[str] = set()


def start() -> None:
    """Arrange for the loaders of the libraries in TARGETS to be patched when these are imported, if UPCAST is on."""
    value = os.environ.get("UPCAST", "").strip().lower()
    if not value or value not in _OFF:
        _offer_to_transformers()
    if value in _OFF or _started:
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


def _offer_to_transformers() -> None:
    if _QUANTIZERS not in sys.modules and not any(isinstance(each, _Offering) for each in sys.meta_path):
        sys.meta_path.insert(0, _Offering())


class _Offering:
    """Finds one module as the others do, once, and has it run `_offer` at its end."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Return nothing for any other module."""
        if name != _QUANTIZERS:
            return None
        try:
            sys.meta_path.remove(self)
            return _followed_by_our_offer(name)
        except Exception:  # then Transformers is imported as if we were not there
            return None


def _followed_by_our_offer(name: str) -> "ModuleSpec | None":
    import importlib.util

    spec = importlib.util.find_spec(name)
    loader: Any = spec and spec.loader

    def run(module: "ModuleType") -> None:
        del loader.exec_module
        loader.exec_module(module)
        try:
            _offer(module)
        except Exception as error:  # of a version that has another registry
            _failures.add(f"{name}: {error}")

    loader.exec_module = run
    return spec


def _offer(quantizers: "Any") -> None:
    class UpcastConfig(quantizers.QuantizationConfigMixin):  # type: ignore[misc]
        """Stands for upcast.UpcastConfig until a checkpoint asks for it."""

        @classmethod
        def from_dict(cls, fields: "dict[str, Any]", **kwargs: "Any") -> "Any":
            """Return the config itself, and have Transformers know it."""
            from upcast.integrations.transformers import quantizer

            return quantizer.UpcastConfig.from_dict(fields, **kwargs)

    quantizers.register_quantization_config("upcast")(UpcastConfig)


def _activate(module: "ModuleType") -> None:
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
    import contextlib
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=1)
    except RuntimeWarning:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error, or a closed one
            sys.stderr.write(f"upcast: {message}\n")
