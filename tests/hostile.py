"""Files and strings that nobody should hand over, tried one by one: `python -m tests.hostile FOLDER` prints what came.

It has a limit of memory, and each case one of time: run it in a process of its own.
"""

import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import upcast
from upcast.core.pattern import matches
from upcast.policy.policy import Policy

SECONDS, BYTES = 30, 8 << 30
Damage = Callable[[Path], object]  # what is done to a copy of a good folder

LONG = "model.layers.11.self_attn.q_proj." * 400


def _write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def _fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def _link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def _config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        fields = yaml.safe_load((folder / "model_config.yaml").read_text())
        (folder / "model_config.yaml").write_text(yaml.dump({**fields, **changes}))

    return damage


def _weights(change: Callable[[dict[str, Any]], Any], **options: Any) -> Damage:
    def damage(folder: Path) -> None:
        state = torch.load(folder / "lit_model.pth")
        torch.save(change(state), folder / "lit_model.pth", **options)

    return damage


def _bomb(depth: int) -> bytes:
    """Mappings that each merge ten of the one before."""
    lines = ["a: &a {x: 1}"]
    for before, letter in zip("abcdefghi"[: depth - 1], "bcdefghij", strict=False):
        lines.append(f"{letter}: &{letter}\n  <<: [{', '.join([f'*{before}'] * 10)}]")
    return "\n".join(lines).encode()


def _overlapping(folder: Path) -> None:
    """Add an archive entry a thousand times, with its bytes once."""
    content = io.BytesIO((folder / "lit_model.pth").read_bytes())
    with zipfile.ZipFile(content, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/998", bytes(1 << 22))
        for number in range(1000):
            entry = zipfile.ZipInfo.__new__(zipfile.ZipInfo)
            for name in zipfile.ZipInfo.__slots__:
                if hasattr(archive.filelist[-1], name):
                    setattr(entry, name, getattr(archive.filelist[-1], name))
            entry.filename = f"archive/data/{number + 1000}"
            archive.filelist.append(entry)
    (folder / "lit_model.pth").write_bytes(content.getvalue())


def _resized(folder: Path) -> None:
    """Say of a tensor of one number, in the format that torch resizes, that it is a matrix of 1.6 GB."""
    state = {**torch.load(folder / "lit_model.pth"), "x": torch.zeros(1).expand(20000, 20001)}
    torch.save(state, folder / "lit_model.pth", _use_new_zipfile_serialization=False)
    content = (folder / "lit_model.pth").read_bytes()
    assert content.count(b"K\x00K\x00\x86") == 1
    (folder / "lit_model.pth").write_bytes(content.replace(b"K\x00K\x00\x86", b"M\x21\x4eK\x01\x86"))


def _aliases(state: dict[str, Any]) -> dict[str, Any]:
    whole = torch.zeros(2000, 100)
    return {**state, **{f"x{i}": whole[i:] for i in range(1000)}}


class Code:
    """Pickled, it runs a command when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch RAN",)


CONFIG, PTH = "model_config.yaml", "lit_model.pth"
LITGPT: dict[str, tuple[Damage, str, str]] = {  # name -> what is done, the file that is named, what is said of it
    "ten million layers": (_config(n_layer=10_000_000), CONFIG, "n_layer is 10000000, and .* has the weights of 3"),
    "layers with windows": (_config(n_layer=10**12, sliding_window_size=3), CONFIG, "has the weights of 3"),
    "a billion experts": (_config(n_expert=10**9, mlp_class_name="LLaMAMoE"), CONFIG, "n_expert is 1000000000"),
    "negative sizes": (_config(n_embd=-32), CONFIG, "negative dimension"),
    "negative layers": (_config(n_layer=-3), PTH, "is not part of the model"),
    "no head": (_config(n_head=0, head_size=None), CONFIG, "ZeroDivisionError"),
    "an unknown class": (_config(mlp_class_name="Foo"), CONFIG, "no attribute 'Foo'"),
    "a class that is none": (_config(mlp_class_name="GPT"), CONFIG, "RecursionError"),
    "an unknown field": (_config(foo=3), CONFIG, "unexpected keyword argument 'foo'"),
    "positions": (_config(block_size=10**13), CONFIG, "too many positions"),
    "a number of words": (_config(n_layer="many"), CONFIG, "TypeError"),
    "a number beyond torch": (_config(padded_vocab_size=10**30), CONFIG, "padded_vocab_size is a number of 100 bits"),
    "many digits": (_write(CONFIG, b"n_layer: " + b"9" * 5000), CONFIG, "is not a LitGPT config"),
    "base sixty": (_write(CONFIG, b"n_layer: " + b"1:" * 30000 + b"1"), CONFIG, "n_layer is a number of"),
    "a list": (_write(CONFIG, b"[1, 2]"), CONFIG, "no names and values"),
    "NUL in YAML": (_write(CONFIG, b"a: \0"), CONFIG, "is not a LitGPT config"),
    "deep YAML": (_write(CONFIG, b"[" * 60000), CONFIG, "nested more than 20 deep"),
    "flat and deep YAML": (_write(CONFIG, b"- " * 30000), CONFIG, "nested more than 20 deep"),
    "a YAML bomb": (_write(CONFIG, _bomb(9)), CONFIG, "it merges mappings"),
    "code in YAML": (_write(CONFIG, b"!!python/object/apply:os.system ['touch RAN']"), CONFIG, "ConstructorError"),
    "large YAML": (_write(CONFIG, b"#" * 100_000), CONFIG, "has more than 65,536 bytes"),
    "a config in Latin-1": (_write(CONFIG, b"name: \xff"), CONFIG, "'utf-8' codec"),
    "a pipe": (_fifo(CONFIG), CONFIG, "no ordinary file"),
    "no end": (_link(CONFIG, "/dev/zero"), CONFIG, "no ordinary file"),
    "a pipe of weights": (_fifo(PTH), PTH, "no file"),
    "weights without end": (_link(PTH, "/dev/zero"), PTH, "no file"),
    "text": (_write(PTH, b"hello\n" * 99), PTH, "cannot be read"),
    "a page": (_write(PTH, b"<html>404</html>"), PTH, "cannot be read, .* Download"),
    "a pointer": (_write(PTH, b"version https://git-lfs.github.com/spec/v1\n"), PTH, "it begins as no such file does"),
    "nothing": (_write(PTH, b""), PTH, "it begins as no such file does"),
    "a safetensors header": (_write(PTH, struct.pack("<Q", 2**60) + b"{}"), PTH, "Download|Save"),
    "code": (_weights(lambda state: {"model": Code()}), PTH, "could run code"),
    "numbers for names": (
        _weights(lambda state: dict(enumerate(state.values()))),
        PTH,
        "some of its names are no text",
    ),
    "integers": (_weights(lambda state: {n: t.to(torch.int8) for n, t in state.items()}), PTH, "torch.int8 on cpu"),
    "no numbers": (_weights(lambda state: {n: t.to("meta") for n, t in state.items()}), PTH, "float32 on meta"),
    "sparse": (_weights(lambda state: {n: t.to_sparse() for n, t in state.items()}), PTH, "float32 on cpu"),
    "long names": (_weights(lambda s: {"h.1." * 100000 + n: t for n, t in s.items()}), CONFIG, "has the weights of 0"),
    "an expanded vector": (
        _weights(lambda state: {**state, "x": torch.zeros(1, dtype=torch.float16).expand(10**11)}),
        PTH,
        "repeat the same numbers",
    ),
    "a thousand views": (_weights(_aliases), PTH, "repeat the same numbers"),
    "overlapping entries": (_overlapping, PTH, "its entries overlap"),
    "a resized tensor": (_resized, PTH, "cannot be read"),
}


def _json(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, **changes}))

    return damage


def _index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = change(json.loads((folder / INDEX).read_text()))
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def _named(name: object) -> Damage:
    return _index(lambda index: {**index, "weight_map": dict.fromkeys(index["weight_map"], name)})


def _outside(prefix: Callable[[Path], str]) -> Damage:
    """Move the first shard out of the folder, and have the index say so."""

    def damage(folder: Path) -> None:
        name = min(path.name for path in folder.glob("*.safetensors"))
        shutil.move(folder / name, folder.parent / name)
        text = (folder / INDEX).read_text()
        (folder / INDEX).write_text(text.replace(f'"{name}"', json.dumps(prefix(folder) + name)))

    return damage


def _header(content: bytes) -> Damage:
    return _write(SAFETENSORS, struct.pack("<Q", len(content)) + content + b"1234")


def _bin(content: object) -> Damage:
    def damage(folder: Path) -> None:
        (folder / SAFETENSORS).unlink()
        torch.save(content, folder / BIN)

    return damage


def _cut_bin(folder: Path) -> None:
    (folder / SAFETENSORS).unlink()
    (folder / BIN).write_bytes(b"PK\3\4 and no more")


SAFETENSORS, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
SIZES = b'{"a": {"dtype": "F32", "shape": [9999999999], "data_offsets": [0, 4]}}'
ONE: dict[str, tuple[Damage, str, str]] = {  # of a folder with one file of weights
    "negative sizes": (_json(hidden_size=-32), "config.json", "negative dimension"),
    "an unknown function": (_json(hidden_act="foo"), "config.json", "'foo'"),
    "a broken config": (_write("config.json", b"{"), "config.json", "is no JSON"),
    "a list": (_write("config.json", b"[1]"), "config.json", "is no config"),
    "a short header": (_write(SAFETENSORS, b"\1\2"), SAFETENSORS, "header too small"),
    "a large header": (_write(SAFETENSORS, struct.pack("<Q", 2**62) + b"{}"), SAFETENSORS, "header too large"),
    "no header": (_header(b"xxxx"), SAFETENSORS, "invalid JSON"),
    "other sizes": (_header(SIZES), SAFETENSORS, "invalid shape"),
    "a pickle of code": (_bin({"a": Code()}), BIN, "Weights only load failed"),
    "a pickle of a list": (_bin([1]), BIN, "is not a state dict"),
    "a pickle of numbers": (_bin({"model.norm.weight": 3}), BIN, "is not a state dict"),
    "a cut pickle": (_cut_bin, BIN, "cannot be read"),
}
SHARDED: dict[str, tuple[Damage, str, str]] = {
    "a shard outside": (_outside(lambda folder: "../"), INDEX, r"it names '\.\./model.* lie in its folder"),
    "an absolute path": (
        _outside(lambda folder: f"{folder.parent}/"),
        INDEX,
        "files of a checkpoint lie in its folder",
    ),
    "a broken index": (_write(INDEX, b"{"), INDEX, "is no JSON"),
    "a deep index": (_write(INDEX, b"[" * 100_000), INDEX, "is no JSON .RecursionError"),
    "an index that is a list": (_write(INDEX, b"[]"), INDEX, "no entries 'metadata' and 'weight_map'"),
    "an empty index": (_write(INDEX, b'{"metadata": {}}'), INDEX, "no entries 'metadata' and 'weight_map'"),
    "a shard that is not there": (_named("nowhere.safetensors"), "nowhere.safetensors", "No such file"),
    "a number for a shard": (_named(3), INDEX, "it names '3'"),
    "a shard with NUL": (_named("a\0.safetensors"), INDEX, "files of a checkpoint lie in its folder"),
    "a shard on another drive": (_named("C:\\a.safetensors"), INDEX, "files of a checkpoint lie in its folder"),
    "a folder for a shard": (_named("."), "", "cannot be read|is a directory"),
}


def _saved(content: bytes) -> Callable[[Path], object]:
    def policy(folder: Path) -> Path:
        (folder / "p.json").write_bytes(content)
        return folder / "p.json"

    return policy


def _piped(folder: Path) -> str:
    os.mkfifo(folder / "pipe.json")
    return str(folder / "pipe.json")


def _endless(folder: Path) -> Path:
    (folder / "zero.json").symlink_to("/dev/zero")
    return folder / "zero.json"


ARCHITECTURE = b'{"policy": "none", "architecture": {"model": [[[]]], "parameters": "x", "hash": {}}}'
POLICIES: dict[str, tuple[Callable[[Path], object], str]] = {  # name -> the policy, what is said of it
    "NUL": (lambda _: "none; h\0=safe", r"'\\x00' cannot be printed \(character 8\)"),
    "a lone surrogate": (lambda _: "none; \ud800=safe", r"'\\ud800' cannot be printed \(character 7\)"),
    "a terminal's orders": (lambda _: "none; \x1b[2J=safe", r"'\\x1b' cannot be printed"),
    "5,000 digits": (lambda _: f"none; h.1..{'9' * 5000}=safe", "a pattern of 5,005 characters .* at most 1,000"),
    "a long policy": (lambda _: "none; " + "*=safe;" * 10_000, "a policy of 70,006 characters; it has at most 65,536"),
    "a long word": (lambda _: "a" * 60_000, r"'a{100}'\.\.\. is no op class"),
    "a pipe": (_piped, r"pipe\.json is no ordinary file"),
    "no end": (_endless, r"zero\.json is no ordinary file"),
    "a folder": (lambda folder: folder, "is no ordinary file"),
    "a path with NUL": (lambda _: "a\0.json", "embedded null"),
    "a path with a surrogate": (lambda _: "\ud800.json", "surrogates not allowed|No such file"),
    "a long path": (lambda _: "a" * 5000 + ".json", "File name too long"),
    "deep JSON": (_saved(b"[" * 100_000), r"p\.json is no JSON"),
    "a long number": (_saved(b'{"policy": ' + b"9" * 5000 + b"}"), r"p\.json is no JSON"),
    "NUL in JSON": (_saved(b'{"policy": "none; \\u0000=safe"}'), r"p\.json.* cannot be printed"),
    "a surrogate in JSON": (_saved(b'{"policy": "\\ud800"}'), r"p\.json.* cannot be printed"),
    "large JSON": (_saved(b" " * (5 << 20)), r"p\.json has more than 4,194,304 bytes"),
    "Latin-1": (_saved(b'{"policy": "\xff"}'), r"p\.json: 'utf-8' codec"),
    "another architecture": (_saved(ARCHITECTURE), r"measured on a \[\[\[\]\]\] of unknown parameters"),
}
PATTERNS: dict[str, tuple[str, str, bool]] = {  # what backtracks: pattern, name, whether it matches
    "stars": ("*" * 12 + "z", LONG, False),
    "stars and letters": ("*a" * 400 + "z", "a" * 5000, False),
    "stars and others": ("*a?" * 300 + "z", "a" * 5000, False),
    "stars and sets": ("*[ab]" * 190 + "z", "ab" * 3000, False),
    "stars and ranges": ("*1..9" * 190 + "z", "1.2x3." * 1000, False),
    "ranges of long numbers": ("*" + "1" * 400 + ".." + "2" * 400, "h." + "1" * 50_000, False),
    "a match at the end": ("*" * 12 + "z", LONG + "z", True),
}


def _tried(call: Callable[[], object]) -> str:
    """Return what a call came to, as kind and message."""
    signal.alarm(SECONDS)
    try:
        return f"returned {call()}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def _loads(good: Path, table: dict[str, tuple[Damage, str, str]], load: Callable[[Path], object]) -> dict[str, str]:
    found = {}
    for name, (damage, _, _) in table.items():
        folder = good.parent / "bad" / good.name
        shutil.copytree(good, folder)
        damage(folder)
        found[name] = _tried(lambda: load(folder))  # noqa: B023 - called at once
        shutil.rmtree(folder.parent)
    return found


def _under_upcast_1(good: Path, load: Callable[[Path], Any]) -> str:
    """Return what loading a checkpoint with a shard outside gives the program that only set UPCAST=1."""
    folder = good.parent / "bad" / good.name
    shutil.copytree(good, folder)
    SHARDED["a shard outside"][0](folder)
    os.environ["UPCAST"], os.environ["UPCAST_VERBOSE"] = "1", "1"
    with redirect_stderr(io.StringIO()) as said:
        kind = _tried(lambda: type(load(folder)).__name__)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("upcast:")]
    return f"{kind}, and {len(lines)} line: {lines}"


def main(base: Path) -> None:
    """Print a JSON object: table -> case -> what came of it."""
    import transformers

    from tests.litgpt_checkpoints import small_config, write_checkpoint

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    write_checkpoint(base / "litgpt", small_config("pythia-14m"), torch.float32)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
    model.save_pretrained(base / "one")
    model.save_pretrained(base / "sharded", max_shard_size="20KB")
    class_, net = transformers.LlamaForCausalLM, nn.Sequential(nn.Linear(8, 8))
    (base / "policies").mkdir()
    found: dict[str, Any] = {
        "policies": {
            name: _tried(lambda: upcast.patch(net, policy=policy(base / "policies")))  # noqa: B023
            for name, (policy, _) in POLICIES.items()
        },
        "patterns": {name: _tried(lambda: matches(text, p)) for name, (p, text, _) in PATTERNS.items()},  # noqa: B023
        "policies at names": _tried(lambda: len(Policy.parse("none; ************z=safe").at(LONG))),
        "litgpt": _loads(base / "litgpt", LITGPT, upcast.load_litgpt),
        "one": _loads(base / "one", ONE, lambda folder: upcast.from_pretrained(class_, folder)),
        "sharded": _loads(base / "sharded", SHARDED, lambda folder: upcast.from_pretrained(class_, folder)),
    }
    found["hook"] = _under_upcast_1(base / "sharded", class_.from_pretrained)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
