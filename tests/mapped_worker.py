"""What may happen to the file of a running model, one thing after another; without a lease the process may die of it.

usage: mapped_worker.py FOLDER FORM [no_lease | refused]; prints a line for each thing that went as promised
"""

import contextlib
import io
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import upcast
from tests.conftest import half_weights

IDS = torch.arange(14).view(2, 7) * 9

Action = Callable[[nn.Module, Path, Path], object]
SAVED, OTHER, BROKEN = "saved", "other", "broken"  # what is under the file's name afterwards


def with_torch(how: Callable[[Any, Path], object]) -> Action:
    return lambda model, file, other: how(model.state_dict(), file)


def to_open_file(state: Any, file: Path) -> None:
    with file.open("wb") as opened:
        torch.save(state, opened)


def by_way_of_memory(state: Any, file: Path) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    file.write_bytes(content.getvalue())


def with_fabric(state: Any, file: Path) -> None:
    from lightning import Fabric

    Fabric(accelerator="cpu", devices=1).save(file, state)


def with_incremental_save(state: Any, file: Path) -> None:
    from litgpt.utils import incremental_save

    with incremental_save(file) as saver:
        saver.save({name: saver.store_early(tensor) for name, tensor in state.items()})


def in_a_child(state: Any, file: Path) -> None:
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            torch.save(state, file)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def with_safetensors(state: Any, file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in state.items()}, file, metadata={"format": "pt"})


def on_a_full_disk(model: nn.Module, file: Path, other: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        torch.save(model.state_dict(), file)
        raise AssertionError("the limit did not hold")
    except (OSError, RuntimeError):
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def in_place(model: nn.Module, file: Path, other: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(other.read_bytes())


def through_a_mapping(model: nn.Module, file: Path, other: Path) -> None:
    content = other.read_bytes()
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[:] = content[: len(mapped)]


def command(*words: str) -> Action:
    def run(model: nn.Module, file: Path, other: Path) -> None:
        named = [word.replace("FILE", str(file)).replace("OTHER", str(other)) for word in words]
        subprocess.run(named, check=True, capture_output=True, env={**os.environ, "LD_PRELOAD": ""})  # of a sanitizer

    return run


def without_waiting(model: nn.Module, file: Path, other: Path) -> None:
    """Coreutils' truncate opens without waiting: it is refused, and finds the file free when it comes again."""
    with contextlib.suppress(subprocess.CalledProcessError):
        command("truncate", "-s", "4096", "FILE")(model, file, other)
    wait_until(lambda: can_be_written(file))
    command("truncate", "-s", "4096", "FILE")(model, file, other)
    assert file.stat().st_size == 4096


def can_be_written(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return False
    return True


def wait_until(question: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not question():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)


def linked(model: nn.Module, file: Path, other: Path) -> None:
    os.link(file, file.with_name("linked"))
    os.truncate(file.with_name("linked"), 10)


def renamed(model: nn.Module, file: Path, other: Path) -> None:
    old = file.rename(file.with_name("old"))
    shutil.copyfile(other, file)
    old.open("wb").close()


def through_torch_s_mapping(model: nn.Module, file: Path, other: Path) -> None:
    torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8).zero_()


def replaced(model: nn.Module, file: Path, other: Path) -> None:
    fresh = file.with_name("fresh")
    shutil.copyfile(other, fresh)
    os.replace(fresh, file)


TORCH: dict[str, tuple[Action, str]] = {
    "torch.save to a str": (with_torch(lambda state, file: torch.save(state, str(file))), SAVED),
    "torch.save to a Path": (with_torch(torch.save), SAVED),
    "torch.save to an open file": (with_torch(to_open_file), SAVED),
    "torch.save in memory": (with_torch(by_way_of_memory), SAVED),
    "torch.save as before 1.6": (
        with_torch(lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False)),
        SAVED,
    ),
    "torch.save in a child": (with_torch(in_a_child), SAVED),
    "torch.save on a full disk": (on_a_full_disk, BROKEN),
}
LITGPT: dict[str, tuple[Action, str]] = {
    "Fabric.save": (with_torch(with_fabric), SAVED),
    "incremental_save": (with_torch(with_incremental_save), SAVED),
}
SAFE: dict[str, tuple[Action, str]] = {
    "save_pretrained": (lambda model, file, other: model.save_pretrained(file.parent), SAVED),  # type: ignore[operator]
    "save_file": (with_torch(with_safetensors), SAVED),
}
FILES: dict[str, tuple[Action, str]] = {
    "shutil.copy": (lambda model, file, other: shutil.copy(other, file), OTHER),
    "cp": (command("cp", "OTHER", "FILE"), OTHER),
    "dd": (command("dd", "if=OTHER", "of=FILE", "conv=notrunc"), OTHER),
    "written in place": (in_place, OTHER),
    "written through a mapping": (through_a_mapping, OTHER),
    "written through torch's mapping": (through_torch_s_mapping, BROKEN),
    "truncated by another name": (linked, BROKEN),
    "renamed and truncated": (renamed, OTHER),
    "os.replace": (replaced, OTHER),
    "os.truncate": (lambda model, file, other: os.truncate(file, 10), BROKEN),
    "opened for writing": (lambda model, file, other: file.open("wb").close(), BROKEN),
    "truncate": (without_waiting, BROKEN),
    "deleted": (lambda model, file, other: file.unlink(), BROKEN),
}
# By another process, or where no audit sees it: only a lease helps.
OUTSIDE = ("torch.save in a child", "cp", "dd", "truncate", "written through torch's mapping")
FEW = {name: ({**TORCH, **FILES})[name] for name in ("torch.save to a str", "shutil.copy", "os.truncate")}
FORMS: dict[str, tuple[torch.dtype, str, dict[str, tuple[Action, str]]]] = {
    "LitGPT float16": (torch.float16, "lit_model.pth", {**TORCH, **LITGPT, **FILES}),
    "LitGPT float32": (torch.float32, "lit_model.pth", FEW),
    "bin float16": (torch.float16, "pytorch_model.bin", FEW),
    "bin float32": (torch.float32, "pytorch_model.bin", FEW),
    "safetensors float16": (torch.float16, "model.safetensors", {**SAFE, **FILES}),
    "safetensors float32": (torch.float32, "model.safetensors", {**SAFE, **FEW}),
}
FORMS["safetensors float32"][2].pop("torch.save to a str")


def write(folder: Path, form: str, seed: int) -> None:
    dtype, name, _ = FORMS[form]
    if name == "lit_model.pth":
        from tests.litgpt_checkpoints import small_config, write_checkpoint

        write_checkpoint(folder, small_config("pythia-160m"), dtype, lambda state: shift(state, seed))
        return
    import transformers

    from tests.integrations.test_loading import SIZES

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype)
    model.save_pretrained(folder)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / name)


def shift(state: dict[str, torch.Tensor], seed: int) -> None:
    for tensor in state.values():
        tensor.add_(seed / 64)


def load(folder: Path) -> nn.Module:
    if (folder / "model_config.yaml").is_file():
        return upcast.load_litgpt(folder)
    import transformers

    return upcast.from_pretrained(transformers.LlamaForCausalLM, folder)


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    result = model(IDS)
    return result if isinstance(result, torch.Tensor) else result.logits


def is_mapped(model: nn.Module, file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


def try_one(folder: Path, other: Path, form: str, action: Action, left: str) -> None:
    """Do one thing to the file of a running model, and look at the model and at what is left."""
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, form, 0)
    file = folder / FORMS[form][1]
    model = load(folder)
    assert half_weights(model)
    assert is_mapped(model, file)
    want = output(model)
    action(model, file, other / file.name)
    assert torch.equal(output(model), want), "the model has changed"
    if left == SAVED:
        assert torch.equal(output(load(folder)), want)
    elif left == OTHER:
        assert torch.equal(output(load(folder)), output(load(other)))
    torch.save(model.state_dict(), folder / "elsewhere.pth")  # whatever has become of the file, nothing is lost
    saved = torch.load(folder / "elsewhere.pth")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def leave_out(choice: str) -> None:
    """Be a system without some of what Linux has."""
    import errno

    from upcast.checkpoint import mapped
    from upcast.kernels import held_files

    held_files.hold_file = lambda *_: (errno.EACCES, 0, [])  # as for another user's file
    if choice != "no lease":
        held_files.own = lambda *_: False  # memory cannot be exchanged under a running model
    if choice == "no list":
        mapped._MAPS = Path("/nowhere")


def rows(choice: str) -> list[tuple[str, str]]:
    """Return (form, name) of what is tried."""
    every = [(form, name) for form, (_, _, actions) in FORMS.items() for name in actions]
    return [row for row in every if not choice or row[1] not in OUTSIDE]


def main(folder: Path, choice: str) -> None:
    """Try everything; each line says what came of one thing."""
    if choice:
        leave_out(choice)
    for form, name in rows(choice):
        if not (folder / form).exists():
            write(folder / form, form, 1)
        try:
            try_one(folder / "own", folder / form, form, *FORMS[form][2][name])
            came = "went well"
        except upcast.UpcastError as error:
            load(folder / "own")  # not a byte was written
            came = f"was refused: {error}"
        print(f"{form}: {name} {came}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
