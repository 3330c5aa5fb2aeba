"""Random damage to policies, patterns, configs, checkpoints, indices and journals, for the given number of seconds.

Each must be taken, or be refused with an UpcastError: `python -m tests.fuzz_files 30 [KIND...]`.
"""

import contextlib
import fnmatch
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import upcast
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast.core.errors import UpcastError
from upcast.core.pattern import matches
from upcast.integrations.litgpt import convert
from upcast.policy.policy import Policy, resolve

SECONDS, BYTES = 20, 8 << 30
WORDS = ["safe", "none", "norm", "+", ";", "=", "*", "?", "..", "1", "99", "h.", "kv_cache", "float32", " ", "[", "]"]
ODD = ["\0", "\ud800", "\n", "é", "9" * 5000, "*" * 2000, "\x1b[2J", "[!", "]"]
PIECES = [
    b"\0",
    b"\xff",
    b"{",
    b"[",
    b'"',
    b"-1",
    b"9" * 30,
    b"1e999",
    b"null",
    b"../",
    b"\\u0000",
    b": ",
    b"\n",
    b"&a *a",
]


def damaged(content: bytes) -> bytes:
    """Return bytes with a few of them changed, lost, repeated or replaced by what parsers like least."""
    for _ in range(random.choice([1, 1, 2, 5])):
        at, length = random.randrange(len(content) + 1), random.choice([1, 1, 4, 50])
        middle = [
            b"",
            bytes([random.randrange(256)]) + content[at + 1 : at + length],
            random.choice(PIECES),
            content[at : at + length] * 2,
            content[(start := random.randrange(len(content) + 1)) : start + length],
        ]
        content = content[:at] + random.choice(middle) + content[at + length :]
    return content[: random.randrange(len(content) + 1)] if random.random() < 0.05 else content


def damage(path: Path, head: int = 1 << 20) -> None:
    """Damage the beginning of a file; of an archive, now and then, its end, where its entries are listed."""
    content = path.read_bytes()
    if random.random() < 0.3 and len(content) > head:
        path.write_bytes(content[:-head] + damaged(content[-head:]))
    else:
        path.write_bytes(damaged(content[:head]) + content[head:])


def text() -> str:
    return "".join(random.choice(WORDS if random.random() < 0.95 else ODD) for _ in range(random.randrange(12)))


class Fuzz:
    """What is damaged again and again, made once in ``base``."""

    def __init__(self, base: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.base, self.llama = base, transformers.LlamaForCausalLM
        write_checkpoint(base / "lit", small_config("pythia-14m"), torch.bfloat16)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
        model = self.llama(transformers.LlamaConfig(**sizes, num_attention_heads=4))
        model.save_pretrained(base / "one")
        model.save_pretrained(base / "sharded", max_shard_size="20KB")
        shutil.copytree(base / "one", base / "bin")
        (base / "bin" / "model.safetensors").unlink()
        torch.save(model.state_dict(), base / "bin" / "pytorch_model.bin")
        self._twin, self._stopped = base / "stopped" / "twin", base / "stopped"
        convert.convert(base / "lit", base / "whole")
        self._stop()

    def _stop(self) -> None:
        """Stop a conversion in its middle."""
        calls, write = iter(range(100)), convert.write_half

        def stopping(*args: object) -> object:
            if next(calls) == 7:
                raise KeyboardInterrupt
            return write(*args)  # type: ignore[arg-type]

        self._stopped.mkdir()
        with contextlib.suppress(KeyboardInterrupt), mock.patch.object(convert, "write_half", stopping):
            convert.convert(self.base / "lit", self._twin)
        shutil.copytree(self._stopped, self.base / "stop")

    def policies(self) -> None:
        policy = Policy.parse(given := text())
        assert Policy.parse(str(policy)) == policy, given
        policy.at("transformer.h.11.attn")

    def saved(self) -> None:
        path = self.base / "p.json"
        Policy.parse("none; h.1..3=norm; storage=float32").to_json(path)
        damage(path)
        resolve(path)

    def patterns(self) -> None:
        pattern, name = text().replace("..", "."), text()
        parts = name.split(".")
        holders = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        if len(pattern) < 40:  # or fnmatch would not come to an end
            expected = any(fnmatch.fnmatchcase(each, pattern) for each in holders)
            assert matches(name, pattern) == expected, (name, pattern)
        matches(name * 50, pattern)

    def _copy(self, name: str) -> Path:
        shutil.rmtree(self.base / "bad", ignore_errors=True)
        return Path(shutil.copytree(self.base / name, self.base / "bad"))

    def configs(self) -> None:
        folder = self._copy("lit")
        damage(folder / "model_config.yaml")
        upcast.load_litgpt(folder)

    def checkpoints(self) -> None:
        folder = self._copy("lit")
        damage(folder / "lit_model.pth", 6000)
        with contextlib.suppress(UpcastError):
            upcast.load_litgpt(folder)
        shutil.rmtree(self.base / "bad-float16", ignore_errors=True)
        convert.convert(folder)

    def indices(self) -> None:
        folder = self._copy("sharded")
        damage(folder / "model.safetensors.index.json")
        upcast.from_pretrained(self.llama, folder)

    def safetensors(self) -> None:
        folder = self._copy("one")
        damage(folder / "model.safetensors", 2000)
        upcast.from_pretrained(self.llama, folder)

    def pickles(self) -> None:
        folder = self._copy("bin")
        damage(folder / "pytorch_model.bin", 3000)
        upcast.from_pretrained(self.llama, folder)

    def journals(self) -> None:
        """Damage what an interrupted conversion left beside the weights; going on gives the same twin."""
        shutil.rmtree(self._stopped)
        shutil.copytree(self.base / "stop", self._stopped)
        notes = [path for path in self._stopped.rglob("*") if path.is_file() and path.suffix in (".json", ".journal")]
        damage(random.choice(notes))
        convert.convert(self.base / "lit", self._twin)
        states = [torch.load(folder / "lit_model.pth") for folder in (self._twin, self.base / "whole")]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


KINDS = ("policies", "saved", "patterns", "configs", "checkpoints", "indices", "safetensors", "pickles", "journals")


def one(kind: str, call: Callable[[], None], seed: int) -> bool:
    """Return whether the damage was taken (not refused); say how to see a failure again."""
    random.seed(seed)
    signal.alarm(SECONDS)
    try:
        call()
    except UpcastError:
        return False
    except BaseException:
        print(f"{kind} with seed {seed}:", flush=True)
        raise
    finally:
        signal.alarm(0)
    return True


def main(seconds: float, kinds: list[str]) -> None:
    """Print, for each kind, how many were taken and how many refused."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    warnings.simplefilter("ignore")
    os.environ["UPCAST_VERBOSE"] = "0"
    counts = {kind: [0, 0] for kind in kinds or KINDS}
    with tempfile.TemporaryDirectory() as base:
        fuzz = Fuzz(Path(base))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for kind, count in counts.items():
                count[one(kind, getattr(fuzz, kind), random.SystemRandom().getrandbits(32))] += 1
    for kind, (refused, taken) in counts.items():
        print(f"{kind}: {taken} taken, {refused} refused")


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
