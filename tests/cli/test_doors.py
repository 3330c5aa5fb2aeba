"""Every door of LitGPT's command line under UPCAST=1: the text is float32's, and the model was really patched.

The quick tests drive all doors in one process, the slow ones run each command as a user would.
"""

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import Run
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast.cli.main import main

pytest.importorskip("litgpt")

PROMPT = "What do llamas eat?"
# A tiny model gains nothing from a second thread, and loses much to it where a neighbour is busy.
ALONE = {"OMP_NUM_THREADS": "1"}
GREEDY = ["--prompt", PROMPT, "--top_k", "1", "--max_new_tokens", "24"]

# door -> (arguments in the folder that `folder` makes, models that are patched)
DOORS = {
    "generate": (["generate", "base", *GREEDY], 1),
    "generate in bfloat16": (["generate", "base", *GREEDY, "--precision", "bf16-true"], 1),
    "generate of bfloat16 weights": (["generate", "bfloat16", *GREEDY], 1),
    "generate_full": (["generate_full", "base", *GREEDY, "--finetuned_path", "draft/lit_model.pth"], 1),
    "generate_speculatively": (["generate_speculatively", "draft", "base", *GREEDY], 2),
    "generate_adapter": (["generate_adapter", "base", *GREEDY, "--adapter_path", "adapter.pth"], 1),
    "generate_adapter_v2": (["generate_adapter_v2", "base", *GREEDY, "--adapter_path", "adapter_v2.pth"], 1),
    "generate of packed weights": (["generate", "packed", *GREEDY], 1),
    "generate_speculatively of packed weights": (["generate_speculatively", "draft", "packed", *GREEDY], 2),
    "generate_adapter of packed weights": (["generate_adapter", "packed", *GREEDY, "--adapter_path", "adapter.pth"], 1),
}

SIZES = {"block_size": 512, "n_embd": 64, "intermediate_size": 160}  # large enough to be packed
PLAIN = {"packed": "bfloat16"}  # what LitGPT itself reads of it

# Runs several commands in one process; prints, as JSON, what each printed after its arguments and what was patched.
DRIVER = """
import contextlib, io, json, sys
from litgpt.__main__ import main
models = []
if sys.argv[2] == "patched":
    from upcast import HalfWeight, PackedWeight
    from upcast.integrations.litgpt import load as ours
    from upcast.integrations.litgpt.modules import Fused
    fill = ours.fill
    def kept(model, *rest, **options):
        fill(model, *rest, **options)
        models.append(model)
    ours.fill = kept
results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv, text = ["litgpt", *arguments], io.StringIO()
    with contextlib.redirect_stdout(text):
        main()
    matrices = [type(p) for m in models for p in m.parameters() if p.dim() == 2]
    stored = [kind for kind in matrices if kind not in (HalfWeight, PackedWeight)] if matrices else []
    fused = [module.__dict__["forward"].calls for m in models for module in m.modules()
             if isinstance(module.__dict__.get("forward"), Fused)] if models else []
    cached = [str(b.attn.kv_cache.k.dtype) for m in models for b in m.transformer.h]
    results[name] = {"text": text.getvalue().partition("}\\n")[2], "models": len(models), "wide": len(stored),
                     "packed": sum(kind.__name__ == "PackedWeight" for kind in matrices),
                     "fused": max(fused, default=0), "caches": sorted(set(cached))}
    models.clear()
print("RESULTS" + json.dumps(results))
"""


def _adapter(kind: str, path: Path) -> None:
    """Write seeded random adapter weights as finetuning writes them, none of them zero."""
    import importlib

    adapter = importlib.import_module(f"litgpt.{kind}")
    settings = vars(small_config("SmolLM2-135M-Instruct", **SIZES))
    names = {field: settings[field] for field in settings if field in adapter.Config.__dataclass_fields__}
    torch.manual_seed(5)
    state = adapter.GPT(adapter.Config(**names)).state_dict()
    kept = {name: 0.3 * torch.randn_like(t) for name, t in state.items() if adapter.adapter_filter(name, t)}
    assert kept
    torch.save({"model": {name: t.half() for name, t in kept.items()}}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny checkpoints: base (float16), draft, bfloat16, and adapters for base."""
    from litgpt.prompts import Alpaca, save_prompt_style

    root = tmp_path_factory.mktemp("doors")
    config = small_config("SmolLM2-135M-Instruct", **SIZES)

    def other(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] += 0.01 * torch.randn_like(state["lm_head.weight"])

    for name, dtype, change in (
        ("base", torch.float16, None),
        ("draft", torch.float16, other),
        ("bfloat16", torch.bfloat16, None),
    ):
        write_checkpoint(root / name, config, dtype, change)
        save_prompt_style(Alpaca(), root / name)
    assert main(["convert", str(root / "bfloat16"), "--storage", "packed", "--output", str(root / "packed")]) == 0
    for kind in ("adapter", "adapter_v2"):
        _adapter(kind, root / f"{kind}.pth")
    return root


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**clean, **ALONE, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def driven(
    python_in: Run, folder: Path, doors: dict[str, list[str]], mode: str, **variables: str
) -> tuple[dict[str, Any], str]:
    result = python_in(folder, "-c", DRIVER, json.dumps(doors), mode, **ALONE, **variables)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.rpartition("RESULTS")[2]), result.stderr


@pytest.fixture(scope="module")
def wanted(python_in: Run, folder: Path) -> dict[str, str]:
    """What each door prints in plain LitGPT, float32 math on the same weights."""
    doors = {
        name: [PLAIN.get(a, a) for a in arguments if a != "bf16-true"] + ["32-true"] * ("bf16-true" in arguments)
        for name, (arguments, _) in DOORS.items()
    }
    plain = {name: a if "--precision" in a else [*a, "--precision", "32-true"] for name, a in doors.items()}
    results, errors = driven(python_in, folder, plain, "plain")
    assert "upcast" not in errors
    texts = {name: result["text"] for name, result in results.items()}
    assert all(len(text) > 20 for text in texts.values())
    return texts


def test_all_doors_in_one_process(python_in: Run, folder: Path, wanted: dict[str, str]) -> None:
    doors = {name: arguments for name, (arguments, _) in DOORS.items()}
    results, errors = driven(python_in, folder, doors, "patched", UPCAST="1", UPCAST_VERBOSE="1")
    for name, (_, count) in DOORS.items():
        found = results[name]
        assert found["text"] == wanted[name], name
        assert (found["models"], found["wide"]) == (count, 0), name
        assert bool(found["packed"]) is ("packed" in name), name
        assert found["fused"] > 0, name
        unfused = "adapter" in name  # attention of adapters keeps LitGPT's own forward and cache
        assert found["caches"] == ["torch.float32" if unfused else "torch.float16"], name
    assert errors.count("upcast: GPT ") == sum(count for _, count in DOORS.values())
    assert "unpatched" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("door", list(DOORS))
def test_each_door_as_a_command(folder: Path, wanted: dict[str, str], door: str) -> None:
    arguments, count = DOORS[door]
    result = run(folder, "-m", "litgpt", *arguments, UPCAST="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.partition("}\n")[2] == wanted[door]
    assert result.stderr.count("upcast: GPT ") == count


def test_a_float32_cache_is_chosen_by_the_environment(python_in: Run, folder: Path, wanted: dict[str, str]) -> None:
    doors = {name: DOORS[name][0] for name in ("generate", "generate_speculatively")}
    doors["mixed"] = [*doors["generate"], "--precision", "bf16-mixed"]
    doors["adapter"] = [*DOORS["generate_adapter"][0], "--precision", "bf16-true"]
    results, errors = driven(python_in, folder, doors, "patched", UPCAST="1", UPCAST_KV_CACHE="float32")
    for name in ("generate", "generate_speculatively"):
        assert results[name]["text"] == wanted[name]
        assert results[name]["caches"] == ["torch.float32"]
    assert results["mixed"]["models"] == results["adapter"]["models"] == 0
    assert errors.count("litgpt.adapter.GPT runs as it is, unpatched: it was asked for in bfloat16 on 'cpu'") == 1
    assert errors.count("base/lit_model.pth is loaded as it is, unpatched: precision='bf16-mixed'") == 1


# --- what cannot be patched -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_splits_the_model_says_that_it_is_not_patched(folder: Path, wanted: dict[str, str]) -> None:
    said = "upcast: litgpt.generate.{} runs as it is, unpatched: it splits the model over devices"
    arguments = [*DOORS["generate"][0][1:], "--precision", "32-true"]
    result = run(folder, "-m", "litgpt", "generate_tp", *arguments, UPCAST="1")
    plain = run(folder, "-m", "litgpt", "generate_tp", *arguments)
    assert result.stderr.count(said.format("tp")) == 1
    assert "upcast" not in plain.stderr
    assert (result.returncode, result.stdout) == (plain.returncode, plain.stdout)
    result = run(folder, "-m", "litgpt", "generate_sequentially", *arguments, UPCAST="1")
    assert result.stderr.count(said.format("sequentially")) == 1
    if not torch.cuda.is_available():  # LitGPT runs it on GPUs only
        assert "CUDA" in result.stderr


# --- chat -------------------------------------------------------------------------------------------------------------


def converse(folder: Path, arguments: list[str], lines: list[str], **variables: str) -> str:
    """Type ``lines`` into a program at its prompts, through a pseudo-terminal; return all that it showed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**clean, **ALONE, **variables},
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    try:
        for line in lines:
            shown += _read_until(ours, b">> Prompt: ")
            os.write(ours, line.encode() + b"\n")
        shown += _read_until(ours, None)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown.decode(errors="replace").replace("\r\n", "\n")


def _read_until(terminal: int, mark: bytes | None) -> bytes:
    """Read until ``mark`` has come, or the program has closed the terminal."""
    shown = b""
    while mark is None or mark not in shown:
        assert select.select([terminal], [], [], 300)[0], f"nothing more came after {shown[-1000:]!r}"
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # closed
            piece = b""
        if not piece:
            assert mark is None, f"ended after {shown[-3000:]!r}"
            break
        shown += piece
    return shown


def replies(shown: str) -> list[str]:
    return [part.partition("Time for inference")[0] for part in shown.split(">> Reply: ")[1:]]


CHAT = ["-m", "litgpt", "chat", "base", "--top_k", "1", "--max_new_tokens", "16"]


@pytest.mark.slow
def test_chat_through_a_terminal(folder: Path) -> None:
    said = ["What do llamas eat?", "Are you sure? They seem to eat more than that, a lot more.", "And?", ""]
    patched = converse(folder, CHAT, said, UPCAST="1")
    plain = converse(folder, [*CHAT, "--precision", "32-true"], said)
    assert replies(patched) == replies(plain)
    assert len(replies(patched)) == 3
    assert all(reply.strip() for reply in replies(patched))
    assert patched.count("upcast: GPT ") == 1
    assert "upcast" not in plain


# --- converters: they run no model, and nothing about them changes ----------------------------------------------------

CONVERTERS = """
import shutil, sys, torch
from pathlib import Path
from litgpt.__main__ import main
out = Path(sys.argv[1])
def litgpt(*arguments):
    sys.argv = ["litgpt", *map(str, arguments)]
    main()
out.mkdir()
litgpt("convert_from_litgpt", "base", out / "hf")
shutil.copytree("base", out / "back")
(out / "back" / "lit_model.pth").unlink()
(out / "hf" / "model.pth").rename(out / "back" / "pytorch_model.bin")
litgpt("convert_to_litgpt", out / "back", "--model_name", "SmolLM2-135M-Instruct")
pretrained = out / "pretrained"
shutil.copytree("base", pretrained)
torch.save({"model": torch.load("base/lit_model.pth")}, pretrained / "lit_model.pth")
litgpt("convert_pretrained_checkpoint", pretrained, out / "exported")
litgpt("merge_lora", "lora")
Path("lora/lit_model.pth").rename(out / "merged.pth")
"""


def _lora(folder: Path) -> None:
    """Write what `litgpt finetune_lora` writes: LoRA weights and the hyperparameters."""
    import shutil

    from litgpt import lora

    settings = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_query": True, "lora_key": False,
                "lora_value": True, "lora_projection": False, "lora_mlp": False, "lora_head": False}  # fmt: skip
    shutil.copytree(folder / "base", folder / "lora", dirs_exist_ok=True)
    (folder / "lora" / "lit_model.pth").unlink()
    torch.manual_seed(6)
    model = lora.GPT(lora.Config.from_file(folder / "base" / "model_config.yaml", **settings))
    weights = {name: torch.randn_like(t).half() for name, t in model.state_dict().items() if lora.lora_filter(name, t)}
    torch.save({"model": weights}, folder / "lora" / "lit_model.pth.lora")
    content = {**settings, "checkpoint_dir": "base", "precision": "16-true"}
    (folder / "lora" / "hyperparameters.yaml").write_text(yaml.dump(content))


@pytest.mark.slow
def test_converters_and_merge_lora_are_left_alone(folder: Path) -> None:
    _lora(folder)
    plain, ours = run(folder, "-c", CONVERTERS, "plain"), run(folder, "-c", CONVERTERS, "ours", UPCAST="1")
    assert plain.returncode == ours.returncode == 0, ours.stderr[-3000:]
    assert "upcast" not in ours.stderr
    made = sorted(path.relative_to(folder / "plain") for path in (folder / "plain").rglob("*.[pb][ti][hn]"))
    assert len(made) == 5
    for path in made:
        want, got = torch.load(folder / "plain" / path), torch.load(folder / "ours" / path)
        want, got = want.get("model", want), got.get("model", got)
        assert list(got) == list(want)
        assert all(torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype for name in want), path


# --- evaluate: LitGPT converts the checkpoint for Transformers, and lm-eval loads it there ----------------------------

EVALUATE = """
import functools, sys
from pathlib import Path
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_path=str(Path("tasks").resolve()))
from litgpt.__main__ import main
sys.argv = ["litgpt", "evaluate", *sys.argv[1:]]
main()
"""

TASK = {
    "task": "llamas",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "tasks/llamas.jsonl"}},
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}

TEXTS = ["Llamas eat grass, hay and shrubs.", "They live in herds, and hum.", "A baby llama is called a cria."]


@pytest.mark.slow
def test_evaluate_with_a_local_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from transformers import GPTNeoXConfig

    config = small_config("pythia-160m", block_size=256)
    write_checkpoint(tmp_path / "checkpoint", config)
    GPTNeoXConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.block_size,
        rotary_pct=config.rotary_percentage,
        architectures=["GPTNeoXForCausalLM"],
        tie_word_embeddings=False,
        dtype="float16",
    ).to_json_file(tmp_path / "checkpoint" / "config.json")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "llamas.yaml").write_text(yaml.dump(TASK))
    (tmp_path / "tasks" / "llamas.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = ["checkpoint", "--tasks", "llamas", "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    plain = run(tmp_path, "-c", EVALUATE, *arguments, "--dtype", "float32", "--out_dir", "plain", **offline)
    ours = run(tmp_path, "-c", EVALUATE, *arguments, "--out_dir", "ours", UPCAST="1", **offline)
    assert plain.returncode == ours.returncode == 0, (plain.stderr + ours.stderr)[-3000:]
    assert ours.stderr.count("upcast: GPTNeoXForCausalLM ") == 1
    assert "upcast" not in plain.stderr
    found = [json.loads((tmp_path / f / "results.json").read_text())["results"]["llamas"] for f in ("plain", "ours")]
    want, got = (result["byte_perplexity,none"] for result in found)
    assert got == pytest.approx(want, rel=1e-5)
    assert want > 1
