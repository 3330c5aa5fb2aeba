"""Start-up hook of upcast, called by Python's site through upcast.pth (from Python 3.15 on: upcast.start).

Top-level, and nothing is imported that Python has not loaded by then: it costs nothing. A finder waits for the modules
below. With UPCAST on when one of them is imported, its loaders are patched; a program that sets the variable later
hears that it is too late. Unless UPCAST is switched off, Transformers learns that a checkpoint whose config names
upcast is ours; upcast is imported when one is loaded.
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
    "litgpt.deploy.serve",
    "litgpt.eval.evaluate",
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
_AWAITED = {_QUANTIZERS, *TARGETS}
_missed: list[str] = []  # what was imported while UPCAST was off


def start() -> None:
    """Wait for the modules of TARGETS, to patch their loaders if UPCAST is on by then."""
    if not any(isinstance(each, _Waiting) for each in sys.meta_path):  # site may read a .pth file twice
        sys.meta_path.insert(0, _Waiting())
    if is_on():
        _hook()


def is_on() -> bool:
    """Return whether UPCAST is set, and not to something that means off."""
    return os.environ.get("UPCAST", "").strip().lower() not in _OFF


def _hook() -> None:
    if _started:
        return
    _started.append(True)
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


class _Waiting:
    """A finder that finds nothing by itself; it sees when one of our modules is about to be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Return what the other finders say of one of our modules, and nothing of all others."""
        if name not in _AWAITED:
            return None
        _AWAITED.discard(name)
        try:
            return self._prepared(name)
        except Exception:  # then it is imported as if we were not there
            return None

    def _prepared(self, name: str) -> "ModuleSpec | None":
        import importlib.util

        if name == _QUANTIZERS:
            declined = os.environ.get("UPCAST", "").strip() and not is_on()
            return None if declined else _followed_by_our_offer(name)
        if _started:
            return None
        if is_on():  # the program has set it, in time
            _hook()
            return importlib.util.find_spec(name)
        if not _missed:
            import atexit

            atexit.register(_say_too_late)
        _missed.append(name)
        return None


def _say_too_late() -> None:
    """At the end of a program: say that UPCAST is on and was not when the libraries were imported, if that is so."""
    if is_on() and not _started:
        library = _missed[0].partition(".")[0]
        _warn(
            f"UPCAST was set after {library} had been imported: what it loads is not patched. Set it before, as in "
            "UPCAST=1 python program.py, or call upcast.patch(model)."
        )


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
    let_arguments_win(quantizers.AutoHfQuantizer)


def let_arguments_win(auto: "Any") -> None:
    """Have the quantization_config that a program gives win over a folder's that only names upcast.

    Transformers would ignore it, or refuse it if it is of another kind; the folder holds plain float16 weights. Of
    packed ones nobody else can make anything: there it is refused.
    """
    import threading

    merge, make, chosen = auto.merge_quantization_configs, auto.from_config, threading.local()
    if merge.__module__ == __name__:
        return

    def merged(_: "Any", /, quantization_config: "Any", quantization_config_from_args: "Any") -> "Any":
        folder, given = _fields(quantization_config), _fields(quantization_config_from_args or {})
        strange = folder.get("weights") == "packed" and given.get("quant_method") != "upcast"
        if quantization_config_from_args is None or folder.get("quant_method") != "upcast" or strange:
            return merge(quantization_config, quantization_config_from_args)
        if folder == given:
            return quantization_config  # a program that has read the folder's: it asks for nothing else
        chosen.config = quantization_config_from_args
        return chosen.config

    def made(_: "Any", /, quantization_config: "Any", **kwargs: "Any") -> "Any":
        if chosen.__dict__.pop("config", None) is quantization_config is not None:
            kwargs["pre_quantized"] = False
        return make(quantization_config, **kwargs)

    auto.merge_quantization_configs, auto.from_config = classmethod(merged), classmethod(made)


def _fields(quantization_config: "Any") -> "dict[str, Any]":
    fields = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    return {name: value for name, value in fields.items() if name != "upcast_version"}


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


def is_command() -> bool:
    """Return whether this process was started as upcast's command line, so that importing upcast may do less."""
    if _commands or sys.argv[:1] != ["-m"]:  # "-m" while Python looks for the module, the package first
        return bool(_commands)
    options = sys.orig_argv[1:]
    ends = [at for at, option in enumerate(options) if option[:1] == "-" != option[1:2] and option[-1:] == "m"]
    return options[ends[0] + 1 : ends[0] + 2] == ["upcast"] if ends else False


_commands: list[bool] = []


def command() -> int:
    """Run the command line."""
    _commands.append(True)
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
