"""Stops `convert` at lines of its own, in three ways, and goes on: what does not end as an undisturbed run is printed.

Run as a program: ``stop_points.py FOLDER WAY STRIDE SEED [STORAGE]``. Ways: ``kill`` (SIGKILL, in a process of its
own), ``interrupt`` (KeyboardInterrupt), ``full`` (the disk, where the disk is written), ``random`` (several kills in a
row).
"""

import errno
import os
import random
import shutil
import signal
import stat
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from upcast import UpcastError
from upcast.checkpoint import conversion, extents, output_folder, packed_file, safetensors_file, zip_writer
from upcast.core import file_lock
from upcast.integrations import checkpoint_kinds, convert_packed
from upcast.integrations.litgpt import convert, convert_source

WAYS = {"float16": convert.convert, "packed": convert_packed.pack, "bfloat16": convert_packed.unpack}
SHARED = (conversion, extents, output_folder, file_lock)
PACKING = (checkpoint_kinds, convert_packed, packed_file, safetensors_file)
TRACED = {module.__file__ for module in (*SHARED, *PACKING, convert, convert_source, zip_writer)}
WRITERS = (
    "appearing",
    "begin",
    "clear",
    "delete",
    "finish",
    "write",
    "copy",
    "_sync_folder",
    "seal",
    "_fill",
    "_fill_file",
    "_opened",
    "allocate",
    "sync",
)
LEFT = {"twin", "twin.partial", "twin.partial.lock"}


class Stop:
    """Ends the run at the line with number ``at``, counted over the lines of `TRACED` that are run."""

    def __init__(self, at: int, way: str) -> None:
        self.at, self.way, self.seen = at, way, 0

    def call(self, frame: FrameType, event: str, arg: object) -> Any:
        name = frame.f_code.co_name
        watched = frame.f_code.co_filename in TRACED and (self.way != "full" or name in WRITERS)
        return self.line if watched else None

    def line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen - 1 == self.at:
                self.stop()
        return self.line

    def stop(self) -> None:
        if self.way == "interrupt":
            raise KeyboardInterrupt
        if self.way == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL)


def write_source(folder: Path, born: bool = False) -> Path:
    """Write a checkpoint; ``born``: with weights that can be packed."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weight = torch.randn(33, 7)
    half = (torch.randn(5, 640) * 0.03).bfloat16()
    state = {"a": weight, "b": torch.randn(5), "tied": weight.clone(), "big": torch.randn(3, 3) * 1e6}
    more = {"born": half, "tied too": half.clone()} if born else {}
    torch.save({**state, **more, "c": torch.randn(4, 2, 3).bfloat16()}, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text("name: small\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.json").chmod(0o444)
    return folder


def content(folder: Path) -> list[tuple[str, int, bytes]]:
    """Return name, mode and bytes of all that is in ``folder``."""
    found = sorted(folder.rglob("*"))
    return [
        (str(p.relative_to(folder)), stat.S_IMODE(p.lstat().st_mode), p.read_bytes() if p.is_file() else b"")
        for p in found
    ]


def run(source: Path, output: Path, at: int, way: str) -> tuple[int, str]:
    """Run to line ``at``; return how many lines were run, and what was said of a full disk."""
    stop = Stop(at, way)
    sys.settrace(stop.call)
    try:
        WAYS[storage](source, output)
    except KeyboardInterrupt:
        pass
    except UpcastError as error:
        return stop.seen, str(error)
    finally:
        sys.settrace(None)
    return stop.seen, ""


def stopped(source: Path, output: Path, at: int, way: str) -> str:
    """Run to line ``at``, killed in another process or stopped in this one; return what it said."""
    if way in ("interrupt", "full"):
        return run(source, output, at, way)[1]
    child = os.fork()
    if not child:
        try:
            run(source, output, at, way)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return ""


def complaint(source: Path, box: Path, stops: list[int], way: str, wanted: Any) -> str:
    """Return what is wrong after stops at these lines and one undisturbed run."""
    before = content(source)
    for at in stops:
        said = stopped(source, box / "twin", at, way)
        if said and "has no room for it" not in said:
            return said
        if not set(os.listdir(box)) <= LEFT:
            return f"left {os.listdir(box)}"
        if (box / "twin").exists() and content(box) != wanted and set(os.listdir(box)) == {"twin"}:
            return "half a twin has its final name"
    try:
        WAYS[storage](source, box / "twin")
    except Exception as error:
        return repr(error)
    if content(source) != before:
        return "the source is touched"
    return "" if content(box) == wanted else f"ends as {[row[:2] for row in content(box)]}"


def main(folder: Path, way: str, stride: int, seed: int) -> None:
    torch.set_num_threads(1)  # forks
    source, box = write_source(folder / "source", born=storage != "float16"), folder / "box"
    if storage == "bfloat16":
        source = folder / "packed"
        convert_packed.pack(folder / "source", source)
    box.mkdir()
    total = run(source, box / "twin", -1, way)[0]
    wanted, draw = content(box), random.Random(seed)
    points = range(seed % stride, total, stride)
    for at in points:
        shutil.rmtree(box)
        box.mkdir()
        stops = [at] + [draw.randrange(total) for _ in range(draw.randrange(1, 4))] * (way == "random")
        wrong = complaint(source, box, stops, way, wanted)
        if wrong:
            print(f"stopped at {stops} of {total}: {wrong}")
    print(f"{len(points)} stops")


storage = "float16"

if __name__ == "__main__":
    storage = (*sys.argv, storage)[5]
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
