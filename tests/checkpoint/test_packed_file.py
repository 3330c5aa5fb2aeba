"""Files of packed weights: what they refuse, and models that compute on them where they lie."""

import json
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import upcast
from tests.conftest import Run
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.packed_checkpoints import PACKED, ordinary, packed, with_escapes
from tests.transformers_models import IDS, TEXT, TOKENS, make, transformers
from upcast.checkpoint import packed_file
from upcast.integrations import convert_packed, exact_tensors
from upcast.patching import engine

# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed file with few tensors, one of them with escapes."""
    tensors = {"a": with_escapes(), "b": ordinary(4, 640), "tied": ordinary(4, 640), "v": torch.ones(5)}
    return packed(tmp_path_factory.mktemp("sound"), tensors)


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the numbers of a file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        fields, numbers = parts(content)
        change(fields)
        return joined(fields, numbers)

    return damage


def said(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change what the file says of its packed weights."""

    def damage(fields: dict[str, Any]) -> None:
        content = json.loads(fields["__metadata__"][packed_file.KEY])
        change(content)
        fields["__metadata__"][packed_file.KEY] = json.dumps(content)

    return header(damage)


def of_a(**fields: Any) -> Callable[[bytes], bytes]:
    return said(lambda content: content["tensors"]["a"].update(fields))


def blob(place: Callable[[Any], int], new: bytes) -> Callable[[bytes], bytes]:
    """Write into the blob of ``a``, at a place of its layout."""

    def damage(content: bytes) -> bytes:
        from upcast.kernels.packed_matrix import layout

        fields, numbers = parts(content)
        what = json.loads(fields["__metadata__"][packed_file.KEY])["tensors"]["a"]
        at = fields["a"]["data_offsets"][0] + place(layout(what["rows"], what["columns"], what["escapes"]))
        return content[: len(content) - len(numbers)] + numbers[:at] + new + numbers[at + len(new) :]

    return damage


def offsets(name: str, begin: int, end: int) -> Callable[[bytes], bytes]:
    return header(lambda fields: fields[name].update(data_offsets=[begin, end]))


WRONG = "what it says of its packed weights is wrong"
LARGE = 1 << 62
HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda content: b"", "it has 0 bytes"),
    "a short length": (lambda content: content[:5], "it has 5 bytes"),
    "a cut header": (lambda content: content[:100], "a header of .* bytes in a file of 100"),
    "a header longer than the file": (lambda c: struct.pack("<Q", 1 << 40) + c[8:], "a header of 1,099,511,627,776"),
    "cut numbers": (lambda content: content[:-8], "its tensors end at byte"),
    "numbers behind the last": (lambda content: content + b"1", "its tensors end at byte"),
    "no JSON": (lambda content: struct.pack("<Q", 4) + b"{{{{" + content, "its header is no JSON"),
    "deep JSON": (lambda content: struct.pack("<Q", 90_000) + b"[" * 90_000, "its header is no JSON"),
    "no UTF-8": (lambda content: struct.pack("<Q", 2) + b"\xff\xff", "its header is no JSON"),
    "a list": (lambda content: joined([], b""), "holds no names"),
    "a name twice": (lambda c: struct.pack("<Q", 15) + b'{"a":1,"a":2}  ', "stands there twice"),
    "metadata of numbers": (header(lambda fields: fields["__metadata__"].update(x=3)), "holds no texts"),
    "another field": (header(lambda fields: fields["v"].update(x=3)), "is not dtype, shape and data_offsets"),
    "a huge shape": (header(lambda fields: fields["v"].update(shape=[LARGE, LARGE])), "'v' is too large"),
    "a negative shape": (header(lambda fields: fields["v"].update(shape=[-5, -1])), "'v' has no shape"),
    "a shape of true": (header(lambda fields: fields["v"].update(shape=[True, 5])), "'v' has no shape"),
    "an unknown dtype": (header(lambda fields: fields["v"].update(dtype="F4")), "of an unknown dtype"),
    "another shape": (header(lambda fields: fields["v"].update(shape=[6])), "has 20 bytes, and its shape takes 24"),
    "overlapping": (offsets("v", 0, 20), "where byte .* is next"),
    "beyond the end": (offsets("v", 1 << 50, (1 << 50) + 20), "where byte .* is next"),
    "backwards": (offsets("v", 20, 0), "has -20 bytes"),
    "no description": (header(lambda fields: fields.pop("__metadata__")), "holds no packed weights"),
    "a description of no JSON": (header(lambda fields: fields["__metadata__"].update({packed_file.KEY: "{"})), WRONG),
    "a later version": (said(lambda content: content.update(version=2)), "of version '2'; this upcast reads version 1"),
    "a version that is true": (said(lambda content: content.update(version=True)), "of version 'True'"),
    "no version": (said(lambda content: content.pop("version")), "of version 'None'"),
    "a field more": (said(lambda content: content.update(more=1)), r"must have version, .* about \['more'\]"),
    "a field less": (said(lambda content: content.pop("tied")), r"about \['tied'\]"),
    "a tensor's field more": (of_a(more=1), r"'a' must have dtype, .* about \['more'\]"),
    "a tensor's field less": (said(lambda c: c["tensors"]["a"].pop("escapes")), r"about \['escapes'\]"),
    "tensors in a list": (said(lambda content: content.update(tensors=[])), "are not names with something to them"),
    "a tensor that is not there": (said(lambda c: c["tensors"].update(x=c["tensors"]["a"])), "the file has no 'x'"),
    "another born dtype": (of_a(dtype="I8"), "is of dtype 'I8'"),
    "one dimension": (of_a(shape=[64 * 1030]), "has two dimensions or more"),
    "no numbers": (of_a(shape=[64, 0]), "of no numbers or too many"),
    "too many numbers": (of_a(shape=[LARGE, LARGE]), "of no numbers or too many"),
    "other rows": (of_a(rows=63), "has 63 rows of 1030, and shape"),
    "other columns": (of_a(columns=515, rows=128), "has 128 rows of 515, and shape"),
    "another shape of as many": (of_a(shape=[128, 515]), "has 64 rows of 1030, and shape"),
    "fewer escapes": (of_a(escapes=7), "bytes, and such a weight takes"),
    "negative escapes": (of_a(escapes=-1), "rows, columns and escapes"),
    "huge escapes": (of_a(escapes=LARGE), "rows, columns and escapes"),
    "escapes of a float": (of_a(escapes=1.0), "rows, columns and escapes"),
    "not uint8": (header(lambda fields: fields["a"].update(dtype="I8")), "and not a row of U8"),
    "not a row": (header(lambda f: f["a"].update(shape=[1, *f["a"]["shape"]])), "and not a row of U8"),
    "tied to nothing": (said(lambda content: content.update(tied={"tied": "x"})), "is tied to 'x'"),
    "tied to a list": (said(lambda content: content.update(tied={"tied": ["b"]})), "is tied to"),
    "tied, and there": (said(lambda content: content.update(tied={"v": "b"})), "'v' is tied to 'b'"),
    "a table that begins with a code": (blob(lambda at: at.table, b"\x01"), "a: a packed matrix has 1 at the head"),
    "pointers that begin late": (blob(lambda at: at.pointers, b"\x01"), "row pointers out of order"),
    "pointers beyond": (blob(lambda at: at.pointers + 4, b"\xff\xff\xff\x7f"), "row pointers out of order"),
    "negative pointers": (blob(lambda at: at.pointers + 8, b"\xff\xff\xff\xff"), "row pointers out of order"),
    "a column beyond": (blob(lambda at: at.columns, b"\xff\xff\x00\x00"), "an escape in column|out of order"),
    "a column far beyond": (blob(lambda at: at.columns, b"\xff\xff\xff\xff"), "column"),
    "columns out of order": (blob(lambda at: at.columns, b"\x05\x04\x00\x00"), "columns of escapes out of order"),
}


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(sound: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(damage(sound.read_bytes()))
    with pytest.raises(upcast.UpcastError, match=message) as caught:
        packed_file.read(path)
    assert str(path) in str(caught.value)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_any_damage_is_read_or_refused(sound: Path, spots: list[tuple[int, int]], numbers: bool) -> None:
    content = bytearray(sound.read_bytes())
    begin, end = (len(content) // 2, len(content)) if numbers else (0, struct.unpack("<Q", content[:8])[0] + 8)
    for place, byte in spots:
        content[begin + place % (end - begin)] = byte
    path = sound.with_name("damaged.safetensors")
    path.write_bytes(content)
    try:
        found = packed_file.read(path)
    except upcast.UpcastError:
        return
    for tensor in found.values():
        exact_tensors.numbers(tensor)


def test_the_reader_in_the_documentation(sound: Path) -> None:
    """Written from the description alone, it reads what upcast writes."""
    page = Path(__file__).parents[2] / "docs" / "concepts" / "packed-format.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    weight = packed_file.read(sound)["a"]
    assert isinstance(weight, upcast.PackedWeight)
    assert weight.store.matrix is not None
    bits = names["unpack"](weight.blob, *weight.store.matrix[1:4])
    assert torch.equal(bits.to(torch.int16), with_escapes().view(torch.int16))


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(upcast.UpcastError, match="no file"):
            packed_file.read(path)


# --- models -----------------------------------------------------------------------------------------------------------

LLAMA = {**TEXT, "hidden_size": 64, "intermediate_size": 128}
IDS_LIT = torch.arange(14).view(2, 7) * 9


def litgpt(folder: Path) -> Path:
    pytest.importorskip("litgpt")

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
        state["transformer.h.1.mlp.proj.weight"][0, :3] = torch.tensor([-0.0, 1e-40, 3e5])

    config = small_config("SmolLM2-135M-Instruct", n_embd=64, intermediate_size=128)
    convert_packed.pack(write_checkpoint(folder / "model", config, torch.bfloat16, spoil))
    return folder / "model-packed"


def test_a_litgpt_model(tmp_path: Path) -> None:
    folder = litgpt(tmp_path)
    model, want = upcast.load_litgpt(folder), upcast.load_litgpt(tmp_path / "model", storage="packed")
    assert [type(p) for p in model.parameters()] == [type(p) for p in want.parameters()]
    assert model.lm_head.weight.blob is model.transformer.wte.weight.blob
    with torch.inference_mode():
        assert torch.equal(model(IDS_LIT), want(IDS_LIT))
        wide = upcast.unpatch(want).float()
        torch.testing.assert_close(model(IDS_LIT), wide(IDS_LIT), rtol=1e-5, atol=1e-5)
    record = engine.record_of(model)
    assert record.policy.storage == "packed"
    changes = {change.name: (change.action, change.dtype) for change in record.plan.changes}
    assert changes["lm_head.weight"] == ("pack", torch.bfloat16)
    assert changes["transformer.wte.weight"] == ("share", torch.bfloat16)
    state = torch.load(tmp_path / "model" / "lit_model.pth")
    assert all(torch.equal(tensor, state[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"storage": "float16"}, upcast.HalfWeight),
        ({"storage": "float32"}, torch.nn.Parameter),
        ({"keep": ["lm_head"]}, torch.nn.Parameter),
        ({"policy": "none"}, upcast.PackedWeight),
    ],
    ids=str,
)
def test_what_the_caller_asks_for_counts(tmp_path: Path, options: dict[str, Any], kind: type) -> None:
    model = upcast.load_litgpt(litgpt(tmp_path), **options)
    assert type(model.lm_head.weight) is kind
    assert torch.equal(model.lm_head.weight.float(), torch.load(tmp_path / "model/lit_model.pth")["lm_head.weight"])


UNDER_UPCAST = """
import torch
from litgpt import LLM
llm = LLM.load("model-packed")
print(type(llm.model.lm_head.weight).__name__)
"""


def test_llm_load_under_upcast_1(tmp_path: Path, python_with_libraries: Run) -> None:
    folder = litgpt(tmp_path)
    done = python_with_libraries("-c", UNDER_UPCAST.replace("model-packed", str(folder)), UPCAST="1")
    assert done.stdout.split() == ["PackedWeight"], done.stderr
    done = python_with_libraries("-c", UNDER_UPCAST.replace("model-packed", str(folder)), UPCAST="0")
    assert done.returncode
    assert "missing the files: ['lit_model.pth']" in done.stderr


def llama(folder: Path, **options: Any) -> Path:
    make("LlamaForCausalLM", "LlamaConfig", LLAMA).bfloat16().save_pretrained(folder / "model", **options)
    convert_packed.pack(folder / "model")
    return folder / "model-packed"


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "40KB"}], ids=["one", "sharded"])
def test_a_transformers_model(tmp_path: Path, shards: dict[str, Any]) -> None:
    auto, folder = transformers.AutoModelForCausalLM, llama(tmp_path, **shards)
    assert len([name for name in os.listdir(folder) if name.endswith(".safetensors")]) > 2 * bool(shards)
    want = upcast.patch(auto.from_pretrained(tmp_path / "model", dtype=torch.bfloat16), storage="packed")
    wide = auto.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for model in (auto.from_pretrained(folder), upcast.from_pretrained(auto, folder)):
        assert {type(p) for p in model.parameters() if p.dim() > 1} == {upcast.PackedWeight}
        assert model.dtype == torch.float32
        with torch.inference_mode():
            assert torch.equal(model(**TOKENS).logits, want(**TOKENS).logits)
            torch.testing.assert_close(model(**TOKENS).logits, wide(**TOKENS).logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")  # an ordinary folder again
    assert torch.equal(auto.from_pretrained(tmp_path / "saved").lm_head.weight.float(), wide.lm_head.weight)


def test_the_way_back_of_transformers(tmp_path: Path) -> None:
    folder = llama(tmp_path, max_shard_size="40KB")
    convert_packed.unpack(folder, tmp_path / "back")
    for name in os.listdir(tmp_path / "model"):
        one, other = tmp_path / "model" / name, tmp_path / "back" / name
        if not name.endswith(".safetensors"):
            assert one.read_bytes() == other.read_bytes(), name
            continue
        found, wanted = (convert_packed._read(path) for path in (other, one))
        assert set(found) == set(wanted)
        assert all(torch.equal(found[key].view(torch.int16), wanted[key].view(torch.int16)) for key in wanted)


def test_experts_that_are_put_together(tmp_path: Path) -> None:
    sizes = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    make("MixtralForCausalLM", "MixtralConfig", sizes).bfloat16().save_pretrained(tmp_path / "model")
    convert_packed.pack(tmp_path / "model")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "model-packed")
    want = upcast.patch(auto.from_pretrained(tmp_path / "model", dtype=torch.bfloat16), storage="packed")
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, want(input_ids=IDS).logits)


def test_another_config_is_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "intermediate_size": 64}))
    with pytest.raises(upcast.UpcastError, match=r"is .* in the checkpoint, and the config makes it"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_where_it_cannot_be_packed_it_is_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    with pytest.raises(upcast.UpcastError, match=r"cannot be used so: dtype=torch.float64.*convert FOLDER"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_another_quantization_on_top_is_refused(tmp_path: Path) -> None:
    auto, folder = transformers.AutoModelForCausalLM, llama(tmp_path)
    with pytest.raises(ValueError, match="The model is quantized with UpcastConfig but you are passing a"):
        auto.from_pretrained(folder, quantization_config=transformers.QuantoConfig())
    model = auto.from_pretrained(folder, quantization_config=upcast.UpcastConfig(keep=["lm_head"]))
    assert type(model.lm_head.weight) is torch.nn.Parameter
    assert type(model.model.embed_tokens.weight) is upcast.PackedWeight


PLAIN = """
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({!r})
"""


@pytest.mark.slow
def test_without_upcast_transformers_says_what_it_does_not_know(tmp_path: Path, python: Run) -> None:
    done = python("-c", PLAIN.format(str(llama(tmp_path))), UPCAST="0")
    assert done.returncode
    assert "Unknown quantization type, got upcast" in done.stderr


# --- mapped -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the system says what is mapped where")
def test_weights_lie_in_the_file(tmp_path: Path) -> None:
    folder = litgpt(tmp_path)
    model = upcast.load_litgpt(folder)
    spans = [
        tuple(int(edge, 16) for edge in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(f"model-packed/{PACKED}")
    ]
    for name, weight in model.named_parameters():
        if isinstance(weight, upcast.PackedWeight):
            first, size = weight.blob.data_ptr(), weight.blob.numel()
            assert any(begin <= first and first + size <= end for begin, end in spans), name


@pytest.mark.skipif(sys.platform != "linux", reason="files are held by leases")
def test_what_happens_to_the_file_does_not_reach_the_model(tmp_path: Path) -> None:
    folder = litgpt(tmp_path)
    model = upcast.load_litgpt(folder)
    with torch.inference_mode():
        want = model(IDS_LIT)
        with (folder / PACKED).open("r+b") as file:
            file.write(bytes((folder / PACKED).stat().st_size))
        os.truncate(folder / PACKED, 10)
        assert torch.equal(model(IDS_LIT), want)
