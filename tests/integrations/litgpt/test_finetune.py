"""LitGPT's finetuning by its command line under UPCAST=1: the losses and files of float32 on the same rounded base."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run, relative_error
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast.integrations import convert_packed

pytest.importorskip("litgpt")

TRAINING = ["--data", "JSON", "--data.json_path", "data.json", "--data.val_split_fraction", "0.2"]
TRAINING += ["--data.num_workers", "0"]
TRAINING += ["--train.epochs", "2", "--train.global_batch_size", "4", "--train.micro_batch_size", "2"]
TRAINING += ["--train.save_interval", "4", "--train.lr_warmup_steps", "1", "--train.max_seq_length", "96"]
TRAINING += ["--eval.interval", "2", "--eval.max_new_tokens", "4", "--eval.max_iters", "2"]
TRAINING += ["--optimizer", '{"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}']

LORA = ["--lora_key", "true", "--lora_projection", "true", "--lora_mlp", "true", "--lora_head", "true"]
# command -> (its own arguments, the file that it writes)
COMMANDS = {
    "finetune_lora": (LORA, "lit_model.pth.lora"),
    "finetune_adapter": ([], "lit_model.pth.adapter"),
    "finetune_adapter_v2": ([], "lit_model.pth.adapter_v2"),
}

# Runs several commands in one process; prints, as JSON, what each model was made of when it had been loaded.
DRIVER = """
import json, sys
from litgpt.__main__ import main
found, results = [], {}
if sys.argv[2] == "patched":
    from upcast import HalfWeight, PackedWeight
    from upcast.integrations import loading
    adopt = loading.adopt
    def kept(model, *rest, **options):
        adopt(model, *rest, **options)
        half = sum(isinstance(p, HalfWeight) for p in model.parameters())
        wide = [n for n, p in model.named_parameters() if p.dim() > 1 and not isinstance(p, HalfWeight)]
        packed = sum(isinstance(p, PackedWeight) for p in model.parameters())
        learning = [(n, str(p.dtype)) for n, p in model.named_parameters() if p.requires_grad]
        found.append({"half": half, "packed": packed, "wide": wide, "learning": learning})
    loading.adopt = kept
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv = ["litgpt", *arguments]
    main()
    results[name] = list(found)
    found.clear()
print("RESULTS" + json.dumps(results))
"""


Driven = Callable[..., tuple[dict[str, Any], str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from litgpt.prompts import Alpaca, save_prompt_style

    root = tmp_path_factory.mktemp("finetune")
    write_checkpoint(root / "base", small_config("SmolLM2-135M-Instruct", block_size=512))
    save_prompt_style(Alpaca(), root / "base")
    samples = [{"instruction": f"Say {n}.", "input": "", "output": "ab" * (n % 5 + 1)} for n in range(20)]
    config = small_config("SmolLM2-135M-Instruct", block_size=512, n_embd=64, intermediate_size=128)
    write_checkpoint(root / "bfloat16", config, torch.bfloat16)
    save_prompt_style(Alpaca(), root / "bfloat16")
    convert_packed.pack(root / "bfloat16", root / "packed")
    (root / "data.json").write_text(json.dumps(samples))
    return root


@pytest.fixture(scope="module")
def run(python_in: Run, folder: Path) -> Driven:
    """Run LitGPT's commands in a process; return what each model was made of, what was printed and what was said."""

    def run(commands: dict[str, list[str]], mode: str, **variables: str) -> tuple[dict[str, Any], str, str]:
        result = python_in(folder, "-c", DRIVER, json.dumps(commands), mode, OMP_NUM_THREADS="1", **variables)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.rpartition("RESULTS")[2]), result.stdout, result.stderr

    return run


def commands(out: str) -> dict[str, list[str]]:
    return {name: [name, "base", "--out_dir", f"{out}/{name}", *TRAINING, *own] for name, (own, _) in COMMANDS.items()}


@pytest.fixture(scope="module")
def runs(run: Driven) -> tuple[dict[str, Any], str]:
    """Train with every command, in plain float32 and patched; return what was patched and what was said."""
    plain = {name: [*arguments, "--precision", "32-true"] for name, arguments in commands("plain").items()}
    _, _, errors = run(plain, "plain")
    assert "upcast" not in errors
    found, _, errors = run(commands("patched"), "patched", UPCAST="1")
    return found, errors


def curve(folder: Path, *path: str) -> torch.Tensor:
    (file,) = folder.joinpath(*path).rglob("metrics.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    return torch.tensor([float(row[key]) for row in rows for key in ("loss", "val_loss") if row.get(key)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)
    return dict(state.get("model", state))


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_base_is_float16_and_what_learns_float32(runs: tuple[dict[str, Any], str], command: str) -> None:
    ((found,), errors) = (runs[0][command], runs[1])
    assert found["half"] >= 3 * 5
    assert found["learning"]
    assert {dtype for _, dtype in found["learning"]} == {"torch.float32"}
    assert set(found["wide"]) <= {name for name, _ in found["learning"]}
    assert "unpatched" not in errors


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_loss_curve_is_float32_s(folder: Path, runs: object, command: str) -> None:
    want, got = (curve(folder, out, command) for out in ("plain", "patched"))
    assert len(want) > 10
    assert want[-1] < want[0]
    assert torch.allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_checkpoints_are_float32_s(folder: Path, runs: object, command: str) -> None:
    file = COMMANDS[command][1]
    for step in ("step-000004", "final"):
        want, got = (weights(folder / out / command / step / file) for out in ("plain", "patched"))
        assert want.keys() == got.keys()
        for name in want:
            assert type(got[name]) is torch.Tensor
            assert got[name].dtype == torch.float32
            assert relative_error(got[name], want[name]) < 1e-3, name


def test_merged_lora_is_float32_s_and_loads_in_plain_litgpt(folder: Path, runs: object) -> None:
    from litgpt import GPT, Config

    models = []
    for out in ("plain", "patched"):
        final = folder / out / "finetune_lora" / "final"
        model = GPT(Config.from_file(final / "model_config.yaml"))
        model.load_state_dict(weights(final / "lit_model.pth"))
        models.append(model.eval())
    ids = torch.arange(1, 21).view(2, 10)
    with torch.inference_mode():
        want, got = (model(ids) for model in models)
    base = GPT(Config.from_file(folder / "base" / "model_config.yaml"))
    base.load_state_dict(weights(folder / "base" / "lit_model.pth"))
    assert relative_error(got, want) < 1e-4
    assert relative_error(got, base.eval()(ids)) > 1e-2  # it has learned something


def test_resume_takes_the_adapter_s_numbers(run: Driven, folder: Path, runs: object) -> None:
    again = {name: [*commands("patched")[name], "--resume", "true"] for name in COMMANDS if "adapter" in name}
    name = "finetune_adapter_v2"
    before = weights(folder / "patched" / name / "final" / COMMANDS[name][1])
    found, said, _ = run({name: [*again[name], "--train.max_steps", "2"]}, "patched", UPCAST="1")
    assert "Resuming training from" in said
    assert found[name][0]["half"] > 0
    after = weights(folder / "patched" / name / "final" / COMMANDS[name][1])
    moved = [relative_error(after[key], before[key]) for key in after if before[key].norm() > 0]
    assert max(moved) < 1.5


@pytest.mark.parametrize("command", ["finetune_lora", pytest.param("finetune_adapter", marks=pytest.mark.slow)])
def test_a_packed_base(run: Driven, folder: Path, command: str) -> None:
    own, file = COMMANDS[command]
    options = [*TRAINING, *own, "--train.max_steps", "4"]
    run({command: [command, "bfloat16", "--out_dir", "of bfloat16", *options, "--precision", "32-true"]}, "plain")
    found, _, _ = run({command: [command, "packed", "--out_dir", "of packed", *options]}, "patched", UPCAST="1")
    assert found[command][0]["packed"] == 3 * 5 + 2
    want, got = (curve(folder, out) for out in ("of bfloat16", "of packed"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    written = [weights(folder / out / "final" / file) for out in ("of bfloat16", "of packed")]
    if command == "finetune_lora":
        assert not [*(folder / "of packed" / "final").glob("base-*")]
        written += [weights(folder / out / "final" / "lit_model.pth") for out in ("of bfloat16", "of packed")]
    for want, got in zip(written[::2], written[1::2], strict=True):
        assert got.keys() == want.keys()
        assert max(relative_error(got[name], want[name]) for name in want) < 1e-3
    for out in ("of bfloat16", "of packed"):
        shutil.rmtree(folder / out)


def test_another_precision_runs_unpatched_and_says_so(run: Driven) -> None:
    arguments = [*commands("bf16")["finetune_lora"], "--train.max_steps", "2", "--precision"]
    both = {precision: [*arguments, precision] for precision in ("bf16-true", "bf16-mixed")}
    found, _, errors = run(both, "patched", UPCAST="1")
    assert found == {"bf16-true": [], "bf16-mixed": []}
    assert errors.count("is loaded as it is, unpatched") == 2


@pytest.mark.parametrize("policy", ["none"])
def test_the_environment_s_policy_has_its_effect(run: Driven, folder: Path, runs: object, policy: str) -> None:
    arguments = [*commands(policy)["finetune_lora"], "--train.max_steps", "2"]
    found, _, errors = run({"finetune_lora": arguments}, "patched", UPCAST="1", UPCAST_POLICY=policy)
    assert found["finetune_lora"][0]["half"] >= 3 * 5
    assert {dtype for _, dtype in found["finetune_lora"][0]["learning"]} == {"torch.float32"}
    assert f"; policy {policy}" in errors
    safe, got = curve(folder, "patched", "finetune_lora")[0], curve(folder, policy, "finetune_lora")[0]
    assert 1e-6 < abs(got - safe) < 1e-2  # float16's digits


def test_a_policy_that_names_no_module_is_refused_before_a_weight_is_read(run: Driven) -> None:
    arguments = [*commands("refused")["finetune_lora"], "--train.max_steps", "2"]
    found, _, errors = run({"finetune_lora": arguments}, "patched", UPCAST="1", UPCAST_POLICY="safe; elsewhere=norm")
    assert found == {"finetune_lora": []}
    assert errors.count("is loaded as it is, unpatched") == 1
    assert "elsewhere" in errors


def test_clipping_is_refused_by_litgpt_itself(folder: Path) -> None:
    """LitGPT's finetuning has no --train.max_norm; clipping on a patched model is in test_learning.py."""
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune import adapter, adapter_v2, lora

    for module in (lora, adapter, adapter_v2):
        with pytest.raises(ValueError, match="doesn't support the 'max_norm' argument"):
            module.validate_args(TrainArgs(epochs=1, max_norm=1.0), EvalArgs(max_new_tokens=4))
