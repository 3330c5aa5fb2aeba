"""certify: the figures are those of their definitions, and float16 that fails is said to."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from litgpt.model import GPT

import upcast
from tests.conftest import Run, half_weights, rounded
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.models import snapshot
from tests.planted import build, plant
from tests.transformers_models import FAMILIES, make
from upcast import UpcastError
from upcast.cli.main import main

IDS = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> Any:
    return build("Llama-3.2-1B", 0)


def row(certificate: Any, variant: str) -> Any:
    return next(each for each in certificate.rows if each.variant == variant)


def test_figures_are_those_of_their_definitions(model: Any) -> None:
    certificate = upcast.certify(model, IDS, window=64, windows=3, greedy=4)
    assert [each.variant for each in certificate.rows] == ["float32", "upcast", "bfloat16", "float16"]
    assert certificate.positions == 64 * 3
    with torch.no_grad():
        pairs = [
            (rounded(model)(IDS[None, s : s + 64])[0].double(), model(IDS[None, s : s + 64])[0].double())
            for s in (0, 64, 128)
        ]
    ours, theirs = (torch.cat(each) for each in zip(*pairs, strict=True))
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    found = row(certificate, "upcast")
    assert found.error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-3)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-2)
    assert found.kl_worst == pytest.approx(float(kl.max()), rel=1e-2)
    assert found.kl <= found.kl_99 <= found.kl_worst
    assert found.top1 == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))
    nll = F.cross_entropy(ours, IDS[1:193])
    assert found.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-5)
    float32 = row(certificate, "float32")
    assert (float32.error, float32.kl_worst, float32.top1, float32.greedy) == (0.0, 0.0, 1.0, 1.0)
    assert float32.times_float32 == 1.0  # a pass of its own, a moment ago
    assert all(0 < each.times_float32 < math.inf for each in certificate.rows)
    assert f"{found.times_float32:.2f}x" in certificate.to_markdown()
    assert row(certificate, "bfloat16").error > 3 * row(certificate, "float16").error > 3 * 1e-5
    assert found.weight_bytes < 0.6 * float32.weight_bytes


def test_a_bfloat16_checkpoint_has_a_row_for_packed_weights() -> None:
    torch.manual_seed(0)
    saved = GPT(small_config("Llama-3.2-1B", n_embd=128, padded_vocab_size=320)).eval().bfloat16()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.mul_(2.0**-10)  # norms cancel it, float16 loses digits
    certificate = upcast.certify(copy.deepcopy(saved).float(), IDS[:80], window=64, greedy=2)
    assert [each.variant for each in certificate.rows][1:3] == ["upcast", "upcast packed"]
    packed = row(certificate, "upcast packed")
    assert packed.error < 1e-5
    assert packed.error < 0.1 * row(certificate, "upcast").error  # float16 rounds its small numbers
    assert packed.weight_bytes < 0.85 * row(certificate, "upcast").weight_bytes
    again = upcast.certify(upcast.patch(saved, storage="packed"), IDS[:80], window=64, greedy=2)
    assert [each.variant for each in again.rows] == [each.variant for each in certificate.rows]
    assert row(again, "upcast packed").weight_bytes == packed.weight_bytes


@pytest.mark.parametrize("state", ["float32", "safe", "none"])
def test_the_model_stays_as_it_was(model: Any, state: str) -> None:
    model = copy.deepcopy(model)
    if state != "float32":
        upcast.patch(model, policy=state)
    before, parameters = snapshot(model), dict(model.named_parameters())
    certificate = upcast.certify(model, IDS[:80], window=64, greedy=2)
    assert row(certificate, "upcast").error is not None
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert bool(half_weights(model)) is (state != "float32")
    assert {k: set(d) for k, (_, d) in snapshot(model).items()} == {k: set(d) for k, (_, d) in before.items()}


def test_plain_float16_that_overflows_is_not_finite(tmp_path: Path) -> None:
    fault = plant(7)
    certificate = upcast.certify(fault.model, IDS[:80], window=64, greedy=2)
    broken, ours = row(certificate, "float16"), row(certificate, "upcast")
    assert broken.error is None
    assert broken.kl is None
    assert broken.nonfinite > 0
    assert ours.error < 1e-2
    assert "NaN" in str(certificate)
    assert "| float16 | NaN |" in certificate.to_markdown()
    content = json.loads(certificate.to_json(tmp_path / "c.json"))
    assert [each["variant"] for each in content["rows"]] == ["float32", "upcast", "bfloat16", "float16"]
    pytest.importorskip("matplotlib")
    assert certificate.plot(tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_policy_can_be_certified(model: Any) -> None:
    certificate = upcast.certify(model, IDS[:80], window=64, greedy=2, policy="none")
    assert row(certificate, "upcast").error == row(certificate, "float16").error
    assert certificate.policy == "none"


def test_bad_texts_are_refused(model: Any) -> None:
    with pytest.raises(UpcastError, match="text without a tokenizer"):
        upcast.certify(model, "some text")
    with pytest.raises(UpcastError, match="3 tokens; at least 34"):
        upcast.certify(model, IDS[:3])
    with pytest.raises(UpcastError, match=r"token ids are on meta; .* Move them with .to\('cpu'\)"):
        upcast.certify(model, IDS.to("meta"))
    with pytest.raises(UpcastError, match="GPT fails in float32 already, on 64 token ids: IndexError"):
        upcast.certify(model, torch.full((80,), 5000), window=64)
    with pytest.raises(UpcastError, match=r"fails in float32 already, on 199 token ids: .* window= is how many"):
        upcast.certify(model, IDS, window=500)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UpcastError, match="not finite in float32 already"):
        upcast.certify(broken, IDS[:80])


@pytest.mark.parametrize("setting", [{"window": 0}, {"windows": 0}, {"greedy": -1}], ids=str)
def test_sizes_that_are_none_are_refused(model: Any, setting: dict[str, int]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(UpcastError, match=f"{name} is {value}; it must be at least {value + 1}"):
        upcast.certify(model, IDS[:80], **setting)


@pytest.mark.parametrize("kind", ["BertModel", "T5ForConditionalGeneration"])
def test_what_is_no_causal_language_model_is_refused(kind: str) -> None:
    model = make(*next(row for row in FAMILIES if row[0] == kind)[:3])
    with pytest.raises(UpcastError, match="causal language model"):
        upcast.certify(model, IDS % 100, window=64)


def test_lists_of_ids_are_texts(model: Any) -> None:
    options = {"window": 64, "windows": 1, "greedy": 0}
    given = upcast.certify(model, IDS.tolist(), **options), upcast.certify(model, IDS[None], **options)
    assert row(given[0], "float16").kl == row(given[1], "float16").kl > 0


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> Path:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["transformer.h.1.mlp.proj.weight"].mul_(4e5)

    return write_checkpoint(tmp_path_factory.mktemp("c") / "model", small_config("Llama-3.2-1B"), spoil=spoil)


def test_diagnose_on_the_command_line(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    files = {name: tmp_path / name for name in ("d.json", "d.png", "p.json")}
    options = ["--json", files["d.json"], "--plot", files["d.png"], "--save", files["p.json"]]
    assert main(["diagnose", str(checkpoint), "What do llamas eat?", *map(str, options)]) == 0
    out = capsys.readouterr().out
    assert "culprit: transformer.h.1.mlp.proj: linear output" in out
    assert all(path.stat().st_size for path in files.values())
    model = upcast.load_litgpt(checkpoint, policy=files["p.json"])
    assert bool(model(IDS[None, :16]).isfinite().all())


def test_certify_on_the_command_line(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text").write_text("What do llamas eat? Grass and hay, mostly. " * 8)
    options = ["--text", tmp_path / "text", "--markdown", tmp_path / "c.md", "--windows", "2", "--window", "64"]
    assert main(["certify", str(checkpoint), *map(str, options)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["float32", "upcast", "bfloat16", "float16"]
    assert "| float16 | NaN |" in (tmp_path / "c.md").read_text()


def test_mistakes_on_the_command_line(checkpoint: Path, tmp_path: Path, python_with_libraries: Run) -> None:
    failed = python_with_libraries("-m", "upcast", "diagnose", str(tmp_path), "hello")
    assert failed.returncode == 2
    assert "is no checkpoint folder" in failed.stderr
    assert main(["certify", str(checkpoint), "--policy", "sensible"]) == 2
    assert main(["certify", str(checkpoint), "--text", str(tmp_path / "missing")]) == 2


def test_a_transformers_folder_can_be_certified(tmp_path: Path, capsys: Any) -> None:
    from tests.litgpt_checkpoints import write_tokenizer

    transformers = pytest.importorskip("transformers")
    from tests.transformers_models import TEXT

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT, "vocab_size": 320})
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    (tmp_path / "llama" / "generation_config.json").unlink()
    assert main(["certify", str(tmp_path / "llama"), "--windows", "1", "--window", "64"]) == 0
    assert capsys.readouterr().out.startswith("LlamaForCausalLM: 64 positions")
