"""A loaded model outlives what happens to its file; a save into its own folder works, or is refused before a byte."""

import gc
import hashlib
import mmap
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import Run, address, half_weights
from tests.integrations.test_loading import mapped
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.mapped_worker import can_be_written, is_mapped, output, rows, shift, wait_until
from tests.peak_memory import ROOT
from upcast.checkpoint import mapped as ours
from upcast.checkpoint import overwriting
from upcast.core.pages import give_back_pages
from upcast.kernels import native

pytest.importorskip("litgpt")
pytest.importorskip("lightning")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux's"),
    pytest.mark.skipif(not native.available(), reason="native kernels are not built"),
]

Came = Callable[[str], dict[str, str]]  # choice -> what came of each row
IN_ONE_STEP = ("Fabric.save", "save_pretrained", "save_file", "os.replace", "deleted")  # a new file, then its name


@pytest.fixture(scope="module")
def came(python_in: Run, tmp_path_factory: pytest.TempPathFactory) -> Came:
    """Return what came of everything that `mapped_worker` tries, by form and name; each system is tried once."""
    found: dict[str, dict[str, str]] = {}

    def ask(choice: str) -> dict[str, str]:
        if choice not in found:
            result = python_in(ROOT, "-m", "tests.mapped_worker", tmp_path_factory.mktemp("mapped"), choice)
            lines = [f"{form}: {name}" for form, name in rows(choice)]
            said = result.stdout.splitlines()
            found[choice] = {
                row: line.removeprefix(row) for row in lines for line in said if line.startswith(f"{row} ")
            }
            last = f"the process ended with {result.returncode}: {result.stderr[-2000:]}"
            found[choice] |= {row: last for row in lines if row not in found[choice]}
        return found[choice]

    return ask


@pytest.mark.parametrize(("form", "name"), rows(""))
def test_what_happens_to_the_file_does_not_reach_the_model(came: Came, form: str, name: str) -> None:
    assert came("")[f"{form}: {name}"] == " went well"


@pytest.mark.parametrize(("form", "name"), rows("no lease"))
def test_without_a_lease_this_process_copies_before_it_writes(came: Came, form: str, name: str) -> None:
    assert came("no lease")[f"{form}: {name}"] == " went well"


@pytest.mark.parametrize(("form", "name"), rows("no list"))
def test_where_memory_cannot_be_exchanged_the_write_is_refused(came: Came, form: str, name: str) -> None:
    want = " went well" if name in IN_ONE_STEP else "nothing is written. Write to another name beside it"
    assert want in came("no list")[f"{form}: {name}"]


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"))


def file_of(folder: Path) -> Path:
    return folder / "lit_model.pth"


def other_than(folder: Path) -> bytes:
    write_checkpoint(folder.parent / "other", small_config("pythia-160m"), spoil=lambda state: shift(state, 1))
    return file_of(folder.parent / "other").read_bytes()


def test_a_float16_checkpoint_stays_shared_until_somebody_writes(folder: Path) -> None:
    model = upcast.load_litgpt(folder)
    want = output(model)
    assert mapped(model, folder) >= half_weights(model).keys()
    places = {name: address(weight) for name, weight in half_weights(model).items()}
    assert not can_be_written(file_of(folder))  # who does not wait is refused ...
    wait_until(lambda: can_be_written(file_of(folder)))  # ... and let in once the model has what it needs
    assert not mapped(model, folder)
    assert {name: address(weight) for name, weight in half_weights(model).items()} == places
    assert torch.equal(output(model), want)


def test_a_model_leaves_nothing_behind(folder: Path) -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    upcast.load_litgpt(folder)  # the watching thread, and what is imported on the way
    before = descriptors()
    model = upcast.load_litgpt(folder)
    assert descriptors() == before + 1
    weight = model.lm_head.weight.stored
    del model
    assert descriptors() == before + 1
    del weight
    assert descriptors() == before
    assert not is_mapped_at_all(folder)
    assert can_be_written(file_of(folder))


def is_mapped_at_all(folder: Path) -> bool:
    return is_mapped(nn.Module(), file_of(folder))


def test_a_file_that_is_open_for_writing_is_copied(folder: Path) -> None:
    content = other_than(folder)
    with file_of(folder).open("r+b") as opened:
        model = upcast.load_litgpt(folder)
        want = output(model)
        assert not mapped(model, folder)
        opened.write(content)
        opened.flush()
        opened.truncate(10)
        assert torch.equal(output(model), want)


@pytest.mark.parametrize("name", ["with space", "new\nline", "ünïcödé", "back\\slash", "back\\012slash", "\x85"])
def test_names_of_files(folder: Path, name: str) -> None:
    folder = folder.rename(folder.with_name(name))
    model = upcast.load_litgpt(folder)
    want = output(model)
    file_of(folder).write_bytes(b"")
    assert torch.equal(output(model), want)


def test_threads_compute_while_the_file_is_written(folder: Path) -> None:
    content = other_than(folder)
    wrong: list[int] = []
    for _ in range(5):
        write = file_of(folder).read_bytes()
        model = upcast.load_litgpt(folder)
        want, stop = output(model), threading.Event()

        def compute(model: nn.Module = model, want: torch.Tensor = want, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                wrong.extend([1] * (not torch.equal(output(model), want)))

        threads = [threading.Thread(target=compute) for _ in range(3)]
        for thread in threads:
            thread.start()
        file_of(folder).write_bytes(content)
        file_of(folder).write_bytes(write)
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_writes_into_weights_are_kept(folder: Path) -> None:
    model = upcast.load_litgpt(folder)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 7
    want = output(model)
    torch.save(model.state_dict(), file_of(folder))
    with torch.no_grad():
        model.lm_head.weight[3, 6] = 8
    assert model.lm_head.weight[3, 5:7].tolist() == [7, 8]
    assert torch.equal(output(upcast.load_litgpt(folder)), want)


NO_MEMORY = """
import resource, sys, torch
from torch import nn
from upcast.checkpoint import mapped
model = nn.Module()
model.register_buffer("a", torch.from_file(sys.argv[1], shared=False, size=150_000_000, dtype=torch.float16))
assert mapped.hold(model) == []
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), -1))
open(sys.argv[1], "r+b").close()
print(model.a[[0, 70_000_000, -1]].tolist())
"""


def test_where_there_is_no_memory_for_a_copy_one_line_says_so(tmp_path: Path, python: Run) -> None:
    with (tmp_path / "numbers").open("wb") as file:
        file.truncate(300_000_000)  # without a block on the disk
    result = python("-c", NO_MEMORY, str(tmp_path / "numbers"))
    assert result.stdout == "[0.0, 0.0, 0.0]\n", result.stderr
    assert result.stderr.count("there is no memory for a copy of its weights; load the model again") == 1


# --- processes --------------------------------------------------------------------------------------------------------

SERVER = """
import hashlib, sys, upcast
from pathlib import Path
from tests.mapped_worker import output
model = upcast.load_litgpt(Path(sys.argv[1]))
for _ in range(2):
    print(hashlib.sha256(output(model).numpy().tobytes()).hexdigest(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def server(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", SERVER, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_two_processes_at_once(folder: Path, server: "subprocess.Popen[str]") -> None:
    assert server.stdin
    assert server.stdout
    model = upcast.load_litgpt(folder)
    want = hashlib.sha256(output(model).numpy().tobytes()).hexdigest()
    assert server.stdout.readline().strip() == want
    file_of(folder).write_bytes(other_than(folder))
    print(file=server.stdin, flush=True)
    assert server.stdout.readline().strip() == want
    assert hashlib.sha256(output(model).numpy().tobytes()).hexdigest() == want


FORKED = """
import ctypes, os, sys, torch, upcast
from pathlib import Path
from tests.mapped_worker import can_be_written, output, wait_until
folder, who = Path(sys.argv[1]), sys.argv[2]
model = upcast.load_litgpt(folder)
want = output(model)
ask, answer = os.pipe(), os.pipe()
python = ctypes.PyDLL(None)  # a server in C forks by itself, and tells Python in the child alone
child = python.fork() if who == "child of C" else os.fork()
if not child:
    if who == "child of C":
        python.PyOS_AfterFork_Child()
        os.write(answer[1], b"up")
    if who == "grandchild" and os.fork():
        os._exit(0)
    os.read(ask[0], 1)
    os.write(answer[1], b"same" if torch.equal(output(model), want) else b"other")
    os._exit(0)
os.close(answer[1])  # a child that dies is heard
if who == "child of C":
    assert os.read(answer[0], 2) == b"up"
if who == "grandchild":
    os.waitpid(child, 0)
if who != "both":
    del model
wait_until(lambda: can_be_written(folder / "lit_model.pth"))  # nobody holds it back for longer than a copy takes
(folder / "lit_model.pth").write_bytes(b"")
os.write(ask[1], b".")
print("child:", os.read(answer[0], 9).decode())
if who == "both":
    print("parent:", "same" if torch.equal(output(model), want) else "other")
"""


@pytest.mark.parametrize("who", ["child", "both", "grandchild", "child of C"])
def test_forks(folder: Path, python_with_libraries: Run, who: str) -> None:
    result = python_with_libraries("-c", FORKED, str(folder), who, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["child: same"] + ["parent: same"] * (who == "both")


# --- what is moved ----------------------------------------------------------------------------------------------------


def from_file(file: Path, size: int = 64) -> torch.Tensor:
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.float16)


def test_what_was_tied_stays_tied_and_nothing_else_becomes_so(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    file.write_bytes(torch.arange(64, dtype=torch.float16).numpy().tobytes())
    one, two = from_file(file), from_file(file)  # mapped twice: the same numbers, apart
    bytes_of = torch.from_file(str(file), shared=False, size=32, dtype=torch.float32)
    model = nn.Module()
    pieces = {"a": one[2:12], "tied": one[2:12], "over": one[7:40].view(3, 11), "columns": one[41:61].view(4, 5).t()}
    odd = torch.from_file(str(file), shared=False, size=128, dtype=torch.uint8)[3:35].view(torch.uint8)
    between = torch.empty(0, dtype=torch.float16).set_(odd.untyped_storage()[3:35])
    unusual = {"between": between, "negated": torch._neg_view(two[20:30]), "steps": two[30:50:2]}
    for name, tensor in {**pieces, "apart": two[2:12], "of_another_size": bytes_of[1:9], **unusual}.items():
        model.register_buffer(name, tensor)
    want = {name: buffer.clone() for name, buffer in model.named_buffers()}
    strides = {name: buffer.stride() for name, buffer in model.named_buffers()}
    assert ours.hold(model) == []
    assert all(torch.equal(buffer, want[name]) for name, buffer in model.named_buffers())
    assert {name: model.get_buffer(name).stride() for name in pieces} == {name: strides[name] for name in pieces}
    file.write_bytes(b"")
    assert all(torch.equal(buffer, want[name]) for name, buffer in model.named_buffers())
    model.a[6] = 99
    assert model.tied[6] == model.over[0, 1] == 99
    assert torch.equal(model.apart, want["apart"])


def test_what_is_shared_for_writing_or_in_no_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    file.write_bytes(bytes(128))
    model = nn.Linear(3, 3)
    model.register_buffer("shared", torch.from_file(str(file), shared=True, size=64, dtype=torch.float16))
    model.register_buffer("none", torch.empty(0))
    before = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    assert ours.hold(model) == []
    assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == before


def test_names_of_other_files_that_are_mapped(tmp_path: Path) -> None:
    """All are in one list of the system's."""
    want = torch.arange(4096.0)
    (tmp_path / "numbers").write_bytes(want.numpy().tobytes())
    tensor = torch.from_file(str(tmp_path / "numbers"), shared=False, size=4096)
    others = []
    for name in (b"\xc2\x85", b"\xe2\x80\xa8", b"caf\xe9", b"new\nline", b"carriage\rreturn"):
        other = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        other.write_bytes(bytes(4096))
        with other.open("rb") as file:
            others.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    give_back_pages(tensor)
    assert torch.equal(tensor, want)


def test_the_last_descriptors_are_the_program_s(tmp_path: Path) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    model = nn.Module()
    for file in files:
        file.write_bytes(torch.arange(64, dtype=torch.float16).numpy().tobytes())
        model.register_buffer(file.name, from_file(file))
    free = os.dup(0)
    os.close(free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, before[1]))
    try:
        overwriting.hold(model)
        os.close(os.open(files[0], os.O_RDONLY))  # the program can go on
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for file in files:
        file.write_bytes(b"")
        assert model.get_buffer(file.name)[3] == 3


@pytest.mark.parametrize("change", ["deleted", "replaced", "shorter"])
def test_a_file_that_is_gone_before_it_is_held(tmp_path: Path, change: str) -> None:
    file = tmp_path / "numbers"
    file.write_bytes(torch.arange(64, dtype=torch.float16).numpy().tobytes())
    model = nn.Module()
    model.register_buffer("a", from_file(file))
    if change == "deleted":
        file.unlink()
    elif change == "replaced":
        (tmp_path / "fresh").write_bytes(bytes(128))
        (tmp_path / "fresh").replace(file)
    else:
        os.truncate(file, 100)
    assert ours.hold(model) == []
    assert model.a[3] == 3
