"""The benchmark: options, statistics, quality figures, stress test, failures, report, and one whole run."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT
from rich.console import Console

from benchmarks import run
from benchmarks.harness import chart, memory, quality, record, report, serving, stress, subject
from benchmarks.harness.job import Loading, Sample, StressOutcome, next_tokens
from benchmarks.harness.session import QUICK, Effort, Rates, Result, job_for, measure, started
from benchmarks.harness.summary import summarise
from benchmarks.harness.variants import BASELINE, VARIANTS, prompt_operations, weight_bytes
from benchmarks.suites import serve as serve_suite

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {"block_size": 256, "n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 64, "vocab_size": 64}
LLAMA = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "bias": False}

BAD_OPTIONS = {
    "unknown variant": (
        ["--variants", "float32,float8"],
        r"float8: not a variant; choose from float32, .*upcast",
    ),
    "empty variants": (["--variants", ","], r"no name: not a variant; choose from float32"),
    "zero rounds": (["--rounds", "0"], r"'0': a whole number of at least 1 is needed"),
    "threads": (["--threads", "two"], r"'two': a whole number of at least 1 is needed"),
    "missing folder": (
        ["--checkpoint", "nowhere"],
        r"--checkpoint nowhere: no such folder; .*litgpt download",
    ),
    "unknown model": (["--model", "pythia-15"], r"--model pythia-15: no such LitGPT config"),
    "nearly a model": (["--model", "PYTHIA-14"], r"Did you mean pythia-14m"),
    "both sources": (["--model", "pythia-14m", "--checkpoint", "x"], r"not allowed with argument"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD_OPTIONS[case]
    with pytest.raises(SystemExit) as ending:
        run.main(arguments)
    assert ending.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_incomplete_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model_config.yaml").touch()
    with pytest.raises(subject.SubjectError, match=r"no lit_model.pth; .*litgpt download"):
        subject.check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("upcast", ["float32", "upcast"]),
        ("upcast, float16", ["float32", "float16", "upcast"]),
        (",".join(reversed(list(VARIANTS))), list(VARIANTS)),
    ],
)
def test_variant_names_keep_the_baseline_and_the_order(text: str, names: list[str]) -> None:
    assert run.variant_names(text) == names


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([3.0], (3.0, 3.0, 3.0, 3.0, 3.0)),
        ([4.0, 1.0], (2.5, 1.0, 1.75, 3.25, 4.0)),
        ([5.0, 1.0, 2.0, 4.0, 3.0], (3.0, 1.0, 2.0, 4.0, 5.0)),
    ],
)
def test_summary(samples: list[float], expected: tuple[float, ...]) -> None:
    summary = summarise(samples)
    found = (summary.median, summary.minimum, summary.lower_quartile, summary.upper_quartile, summary.maximum)
    assert found == expected
    assert summary.samples == tuple(samples)


def test_summary_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


@pytest.mark.parametrize("positions", [1, 7, 64, 65, 129])
def test_quality_against_the_definitions(positions: int) -> None:
    torch.manual_seed(positions)
    reference = torch.randn(positions, 31)
    logits = reference + 0.3 * torch.randn(positions, 31)
    targets = torch.randint(31, (positions,))
    found = quality.assess(logits, reference, targets)
    p, q = reference.double().softmax(-1), logits.double().softmax(-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-9)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    true = q[torch.arange(positions), targets]
    assert found.perplexity == pytest.approx(math.exp(-true.log().mean().item()), rel=1e-6)
    assert found.relative_error == pytest.approx(((logits - reference).norm() / reference.norm()).item(), rel=1e-5)


def test_quality_of_equal_logits_is_exact() -> None:
    logits = torch.randn(33, 17)
    found = quality.assess(logits, logits, torch.zeros(33, dtype=torch.long))
    assert (found.kl, found.relative_error, found.largest_error, found.top1_agreement) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quality_of_nonfinite_logits_is_their_share(bad: float) -> None:
    logits = torch.zeros(8, 4)
    logits[0, :2] = bad
    found = quality.assess(logits, torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))
    assert found.nonfinite_share == 2 / 32
    assert found.relative_error is found.kl is found.perplexity is None


def test_targets_do_not_cross_windows() -> None:
    assert next_tokens(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist() == [2, 3, -100, 5, 6, -100]


def tiny(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(Config(name="tiny", **{**TINY, **LLAMA, **options})).eval()


@pytest.mark.parametrize("scale", [1, 4, 64, 4096])
@pytest.mark.parametrize("parallel", [False, True])
def test_stress_of_a_model_changes_no_logit(scale: int, parallel: bool) -> None:
    tokens = torch.arange(33).unsqueeze(0)
    model = tiny(parallel_residual=parallel)
    with torch.inference_mode():
        expected = model(tokens)
        seen = model.transformer.wte(tokens)
        assert torch.equal(stress.stress(model, scale)(tokens), expected)
        assert torch.equal(model.transformer.wte(tokens), seen * scale)


def test_stress_of_a_state_dict_leaves_a_tied_head_alone() -> None:
    state = tiny().state_dict()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    scaled = stress.stress(state, 4)
    assert torch.equal(scaled["lm_head.weight"], state["lm_head.weight"])
    changed = {name for name in state if not torch.equal(scaled[name], state[name])}
    assert changed == {"transformer.wte.weight"} | {
        f"transformer.h.{block}.{part}.proj.weight" for block in (0, 1) for part in ("attn", "mlp")
    }


@pytest.mark.parametrize("scale", [0, -4, 3, 6])
def test_stress_wants_a_power_of_two(scale: int) -> None:
    with pytest.raises(ValueError, match="only a power of two"):
        stress.stress(tiny(), scale)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"norm_class_name": "LayerNorm"}, "uses LayerNorm"),
        ({"post_mlp_norm": True}, "before the residual add"),
        ({"mlp_class_name": "LLaMAMoE", "n_expert": 2, "n_expert_per_token": 1}, "experts"),
    ],
)
def test_where_the_stress_test_is_exact(options: dict[str, Any], reason: str | None) -> None:
    found = stress.why_not(Config(name="tiny", **{**TINY, **LLAMA, **options}))
    assert (found is None) if reason is None else (reason in str(found))


def test_weight_bytes_count_a_shared_storage_once() -> None:
    model = tiny()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(model) == 4 * parameters
    model.lm_head.weight = model.transformer.wte.weight
    assert weight_bytes(model) == 4 * (parameters - 64 * 32)


def test_what_quantize_dynamic_holds_and_does() -> None:
    model = tiny()
    operations = prompt_operations(model, 8)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = VARIANTS["quantize_dynamic"].finish(model)
    assert weight_bytes(quantized) == 2 * linear + 4 * (parameters - linear)
    assert prompt_operations(quantized, 8) == operations


@pytest.mark.skipif(not memory.supported(), reason="only the Linux kernel tells")
def test_peak_is_noticed_after_it_is_gone() -> None:
    script = """if True:
        from benchmarks.harness import memory
        memory.reset_peak()
        before = memory.peak_bytes()
        block = bytearray(b"1") * (64 << 20)
        del block
        assert memory.peak_bytes() - before > 60 << 20
        memory.reset_peak()
        assert memory.peak_bytes() - before < 60 << 20
    """  # in a process of its own: what other tests leave behind goes when it likes
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=Path(__file__).parents[2])


def fabricated(variant: str, **changes: Any) -> Result:
    """A result as a measurement would leave it."""
    result = Result(
        variant,
        threads=2,
        loading=Loading(651306240, 722235392, 538e6),
        steady_bytes=695033856,
        samples=[Sample(0.3 + 0.01 * index, 0.06, 0.1, (5, 6, 7)) for index in range(3)],
        quality=quality.Quality(128, 0.0, 1.3e-3, 0.1, 1.6e-5, 0.99, 27.285),
        stress=[StressOutcome(scale, 0.0, 1e-6) for scale in (4, 64, 1024, 4096)],
    )
    for name, value in changes.items():
        setattr(result, name, value)
    return result


OVERFLOWN = quality.Quality(128, 1.0, None, None, None, None, None)
RESULTS = {
    "float32": fabricated("float32"),
    "float16": fabricated("float16", quality=OVERFLOWN, stress=[StressOutcome(4, 1.0, None)]),
    "quantize_dynamic": Result("quantize_dynamic", failure="load: its process was killed by signal 9"),
    "upcast": fabricated("upcast", stress=[StressOutcome(4, 0.0, 0.0), StressOutcome(64, 0.25, None)]),
}
CONTEXT = report.Context("tiny", "real weights", "help topics", "a CPU", 2, 3, True, None)
SUBJECT = subject.Subject("tiny", "real weights", "help topics", Path("nowhere"), (1,) * 128, (1, 2), ((3, 4),))


def printed(results: dict[str, Result], context: report.Context) -> str:
    console = Console(width=report.WIDTH, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(report.render(results, context))
    return console.export_text()


def test_table_shows_failures_and_nonfinite_results() -> None:
    text = printed(RESULTS, CONTEXT)
    rows = [line.rstrip() for line in text.splitlines() if line.startswith(" ")]
    of = {name: [row for row in rows if row.split()[:1] == [name]] for name in RESULTS}
    assert all(len(found) == 2 for found in of.values())
    assert "FAILED" in of["quantize_dynamic"][1]
    assert "quantize_dynamic FAILED: load: its process was killed by signal 9" in text
    assert of["float16"][1].count("NaN") == 6  # four figures, one scale, the verdict
    assert "25% NaN" in of["upcast"][1]
    assert "overflows" in of["upcast"][1]
    assert of["float32"][1].endswith("ok")


def test_table_fits_its_width_with_every_column() -> None:
    lines = printed(RESULTS | {"bfloat16": fabricated("bfloat16")}, CONTEXT).splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    assert not any("…" in line for line in lines)


def test_table_without_a_baseline_has_no_ratios() -> None:
    results = {"float32": Result("float32", failure="load: no"), "upcast": fabricated("upcast")}
    text = printed(results, CONTEXT)
    assert "651 " in text
    assert not re.search(r"\d\.\d\dx", text)


def test_table_says_why_there_is_no_stress_test() -> None:
    text = printed({"float32": fabricated("float32", stress=[])}, replace(CONTEXT, skipped_stress="uses LayerNorm"))
    assert "stress test skipped: uses LayerNorm" in text


def test_record_keeps_every_sample_and_survives_json() -> None:
    content = record.record(SUBJECT, QUICK, RESULTS, None, 12.5)
    again = json.loads(json.dumps(content, allow_nan=False))
    assert {"schema", "date", "commit", "machine", "versions", "threads", "variants", "effort"} <= set(again)
    variants = {entry["variant"]: entry for entry in again["variants"]}
    prefill = variants["float32"]["timings"]["prefill_seconds"]
    assert prefill["samples"] == [0.3, 0.31, 0.32]
    assert prefill["median"] == 0.31
    assert {"minimum", "lower_quartile", "upper_quartile", "maximum"} < set(prefill)
    assert variants["float16"]["status"] == "non-finite"
    assert variants["quantize_dynamic"]["status"] == "failed"
    assert variants["quantize_dynamic"]["timings"]["decode_seconds"] is None
    assert variants["upcast"]["ratios"] == dict.fromkeys(variants["upcast"]["ratios"], 1.0)


def test_chart_draws_failures_and_nonfinite_results(tmp_path: Path) -> None:
    path = chart.draw(record.record(SUBJECT, QUICK, RESULTS, None, 1.0), tmp_path / "chart.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("failure", "code"), [(None, 0), ("load: no", 1)])
def test_a_failed_variant_fails_the_run_after_the_report(
    failure: str | None,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = {"float32": fabricated("float32"), "upcast": fabricated("upcast", failure=failure)}
    monkeypatch.setattr(subject, "resolve", lambda *_: SUBJECT)
    monkeypatch.setattr(Config, "from_checkpoint", lambda *_: Config(name="tiny", **TINY, **LLAMA))
    monkeypatch.setattr(run, "run_variants", lambda *_: (results, Rates([1e10], [1e11])))
    monkeypatch.setattr(subject.Subject, "decode", lambda *_: "an answer")
    assert run.main(["--output", str(tmp_path)]) == code
    assert ("upcast FAILED: load: no" in capsys.readouterr().out) == (failure is not None)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


@pytest.mark.slow
def test_a_dead_and_a_refusing_process_fail_alone(tmp_path: Path) -> None:
    folder = subject.write_random_checkpoint(Config.from_name("pythia-14m"), tmp_path)
    good = subject.Subject("tiny", "", "", folder, tuple(range(8)), (1, 2, 3), (tuple(range(16)),))
    broken = replace(good, checkpoint=tmp_path / "nowhere")
    jobs = [
        job_for(good, BASELINE, 1, tmp_path),
        job_for(broken, "float16", 1, tmp_path),
        job_for(good, "bfloat16", 1, tmp_path),
    ]
    with started(jobs) as session:
        os.kill(session.workers["bfloat16"].process.pid or 0, signal.SIGKILL)
        results = measure(session, Effort(2, 3, 16, 1, ()), False, lambda *_: None)
    assert results["bfloat16"].failure == "threads: its process was killed by signal 9"
    assert str(results["float16"].failure).startswith("load: FileNotFoundError")
    assert "Traceback" in results["float16"].details
    assert results[BASELINE].status == "ok"
    assert len(results[BASELINE].samples) == 2


def test_settings_of_upcast_do_not_reach_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.harness.session import _worker_environment

    monkeypatch.setenv("UPCAST", "1")
    monkeypatch.setenv("UPCAST_KERNELS", "portable")
    with _worker_environment():
        inside = {name: value for name, value in os.environ.items() if name.startswith("UPCAST")}
    assert inside == {"UPCAST_KERNELS": "portable", "UPCAST_VERBOSE": "0"}
    assert os.environ["UPCAST"] == "1"


def test_whole_run_on_a_tiny_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--variants", "float16", "--rounds", "2", "--threads", "1", "--output", str(tmp_path)]
    assert run.main(["--model", "pythia-14m", "--quick", *options]) == 0, capfd.readouterr().err
    assert "stress test skipped: pythia-14m uses LayerNorm" in capfd.readouterr().out
    content = json.loads((tmp_path / "pythia-14m.json").read_text())
    assert min((tmp_path / f"pythia-14m{end}.png").stat().st_size for end in ("", "-roofline")) > 10_000
    assert len(content["read_rates"]) == 2
    float32, float16 = content["variants"]
    assert (float32["variant"], float16["variant"]) == ("float32", "float16")
    assert 0.49 < float16["ratios"]["weight_bytes"] < 0.51
    assert float32["quality"]["relative_error"] == 0.0
    assert 0.0 < float16["quality"]["relative_error"] < 0.1
    assert len(float16["timings"]["decode_seconds"]["samples"]) == 2
    assert len(float32["answer_tokens"]) == QUICK.new_tokens


# --- the serve suite --------------------------------------------------------------------------------------------------


def test_serve_figures_are_rates_over_all_requests_and_medians() -> None:
    served = serve_suite.Served(
        first_token=[0.1, 0.3, 0.2], request=[1.0, 2.0, 1.0], tokens=[8, 8, 4], weight_bytes=200,
        second_process_bytes=10, starts=[(5.0, 1.0, 0.5), (4.0, 3.0, 0.1), (6.0, 0.5, 0.2)],
    )  # fmt: skip
    found = serve_suite.figures(served)
    assert (found["requests_per_second"], found["tokens_per_second"]) == (0.75, 5.0)
    assert (found["first_token_seconds"], found["second_process_share"]) == (0.2, 0.05)
    assert (found["import_to_loaded_seconds"], found["import_to_first_token_seconds"]) == (6.5, 6.7)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no smaps_rollup")
def test_memory_of_a_process_knows_the_mapped_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1 << 20)}, tmp_path / "lit_model.pth")
    before = serving.memory_of(os.getpid(), tmp_path)
    weights = torch.load(tmp_path / "lit_model.pth", mmap=True)
    assert float(weights["a"].sum()) == 1 << 20
    after = serving.memory_of(os.getpid(), tmp_path)
    assert before.checkpoint_rss == 0
    assert after.checkpoint_pss == after.checkpoint_rss >= weights["a"].nbytes
    assert 0 < after.anonymous < after.pss
