"""Policies as values: one string in code, in the environment and in files, and errors that point at the mistake."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import upcast
from tests.conftest import Run
from upcast import UpcastError
from upcast.policy import fingerprint
from upcast.policy.policy import ALL, CLASSES, PRESETS, Policy, resolve

CANONICAL = {
    "safe": "safe",
    " none ": "none",
    "residual + norm+linear": "linear+norm+residual",
    "norm+softmax+scores+residual": "sensitive",
    "sensitive+linear+activation": "safe",
    "none; h.*=linear ;h.3 = safe": "none; h.*=linear; h.3=safe",
    "safe;storage=float32; kv_cache=float32": "safe; kv_cache=float32; storage=float32",
    "safe; kv_cache=float16": "safe",
}
# a mistake, and what the line with the caret must point at
MISTAKES = {
    "norm+resdual": "resdual",
    "nrom": "nrom",
    "safe; h.1=scales": "scales",
    "none; kv_cache=float8": "float8",
    "none; foo": "foo",
    "none; =norm": "=norm",
    "none,norm": ",norm",
    "norm linear": "linear",
    "none; h.1=norm-linear": "-linear",
}
PATTERNS = st.text("abch.*0123456789_", min_size=1).filter(lambda p: p not in ("kv_cache", "storage"))
SETS = st.sets(st.sampled_from(sorted(CLASSES))).map(frozenset)
DTYPES = st.sampled_from(["float16", "float32"])


@pytest.mark.parametrize(("text", "canonical"), CANONICAL.items())
def test_reading_and_printing(text: str, canonical: str) -> None:
    assert str(Policy.parse(text)) == canonical
    assert Policy.parse(canonical) == Policy.parse(text)


@given(SETS, st.lists(st.tuples(PATTERNS, SETS), max_size=3).map(tuple), DTYPES, DTYPES)
def test_every_policy_survives_text_json_and_pickle(classes, overrides, kv_cache, storage) -> None:
    policy = Policy(classes, overrides, kv_cache, storage)
    for other in (Policy.parse(str(policy)), Policy.from_json(policy.to_json()), pickle.loads(pickle.dumps(policy))):
        assert other == policy
        assert hash(other) == hash(policy)
        assert str(other) == str(policy)


@pytest.mark.parametrize(("text", "mistake"), MISTAKES.items())
def test_a_mistake_is_pointed_at(text: str, mistake: str) -> None:
    with pytest.raises(UpcastError) as caught:
        Policy.parse(text)
    first, line, caret, *_ = str(caught.value).splitlines()
    at = caret.index("^")
    assert line[at:].startswith(mistake)
    assert f"(character {at - 3})" in first


def test_the_valid_names_are_listed_and_the_nearest_is_offered() -> None:
    with pytest.raises(UpcastError, match="did you mean 'residual'") as caught:
        Policy.parse("norm+resdual")
    assert all(name in str(caught.value) for name in (*CLASSES, *PRESETS))


def test_capitals_are_no_names_and_the_nearest_is_offered() -> None:
    with pytest.raises(UpcastError, match="did you mean 'safe'"):
        Policy.parse("SAFE")


def test_the_last_override_that_matches_counts() -> None:
    policy = Policy.parse("none; h.*=norm; h.1*=linear; h.12=safe")
    names = ("wte", "h.0.attn", "h.1", "h.11.mlp", "h.12.mlp.proj")
    assert [policy.at(name) for name in names] == [
        frozenset(),
        frozenset({"norm"}),
        frozenset({"linear"}),
        frozenset({"linear"}),
        ALL,
    ]
    assert not policy.everywhere
    assert Policy.parse("safe; h.1=safe").everywhere


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


@pytest.mark.parametrize("form", [str, Path, Policy.parse], ids=["string", "path", "value"])
def test_every_form_of_a_policy_is_taken(form, tmp_path: Path) -> None:
    text = "none; 1=norm"
    Policy.parse(text).to_json(tmp_path / "saved.json")
    given = form(tmp_path / "saved.json") if form is Path else form(text)
    model = upcast.patch(net(), policy=given)
    assert str(upcast.patching.engine.record_of(model).policy) == text
    assert f"policy: {text}" in upcast.report(model)
    assert str(resolve(str(tmp_path / "saved.json"))) == text


def test_a_saved_policy_for_another_architecture_is_refused(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps({"policy": "none", "architecture": fingerprint.of(net())}))
    upcast.patch(net(), policy=saved)
    other = nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9))
    before = dict(other.named_parameters())
    found = upcast.search(net(), torch.randn(2, 8), verbose=False)
    diagnosed = upcast.diagnose(net(), torch.randn(2, 8))
    for choice in (saved, str(saved), found, diagnosed):
        with pytest.raises(UpcastError, match=r"measured on a Sequential of 88 parameters .* Run upcast.search"):
            upcast.patch(other, policy=choice)
    assert all(p is before[name] for name, p in other.named_parameters())
    assert fingerprint.of(upcast.patch(net())) == fingerprint.of(net())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (3, "policy is a int; it must be an upcast.Policy, a policy string or the path"),
        ("missing.json", "policy file missing.json: .*No such file"),
        ("none; h.1=norm", "pattern 'h.1' matches no module of Sequential; an override names a module, such as '1'"),
    ],
    ids=str,
)
def test_what_is_no_policy_is_refused(policy: object, message: str) -> None:
    model = net()
    with pytest.raises(UpcastError, match=message):
        upcast.patch(model, policy=policy)
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"policy": 3}', '{"policy": "nroom"}', '{"policy": "none", "architecture": 3}']
)
def test_files_that_hold_no_policy_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UpcastError):
        upcast.patch(net(), policy=tmp_path / "p.json")


def test_storage_is_a_choice_of_the_policy() -> None:
    model = upcast.patch(net(), policy="norm; storage=float32")
    assert type(model[0].weight) is nn.Parameter
    assert model(torch.randn(2, 8)).dtype == torch.float32
    assert (
        upcast.patch(nn.Sequential(nn.Linear(8, 8)), policy="none; storage=float32")(torch.randn(2, 8)).dtype
        == torch.float16
    )


def test_the_environment_takes_the_same_string(python_with_libraries: Run) -> None:
    script = "from upcast.core import config; print(config.read().policy)"
    assert (
        python_with_libraries("-c", script, UPCAST_POLICY="none; h.1=norm+linear").stdout.strip()
        == "none; h.1=norm+linear"
    )
    failed = python_with_libraries("-c", script, UPCAST_POLICY="sensible")
    assert "UPCAST_POLICY='sensible' in the environment: policy 'sensible'" in failed.stderr
    assert "did you mean 'sensitive'" in failed.stderr
