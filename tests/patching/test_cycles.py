"""A model's memory goes with its last reference: nothing of ours waits for the garbage collector."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import Run
from tests.litgpt_checkpoints import small_config

Made = tuple[Any, Callable[[Any], object]]  # a model, and what is done with it


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def plain() -> Any:
    parts = nn.Embedding(50, 16), nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 50)
    return nn.Sequential(*parts).eval()


def litgpt_model(name: str = "pythia-14m") -> Any:
    litgpt = pytest.importorskip("litgpt")
    return litgpt.GPT(small_config(name)).eval()


def llama(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **changes})).eval()


IDS = torch.tensor([[1, 2, 3, 4]])


def call(model: Any) -> object:
    with torch.no_grad():
        return model(IDS)


def cached(model: Any) -> None:
    """LitGPT's generation, which keeps its caches and goes on with them."""
    from litgpt.generate.base import generate

    for _ in range(2):
        model.set_kv_cache(1)
        generate(model, IDS[0], 8, temperature=0)
    model.clear_kv_cache()
    model.set_kv_cache(1)
    generate(model, IDS[0], 8, temperature=0)


def generated(model: Any) -> None:
    model.generate(IDS, max_new_tokens=4, do_sample=False)


def backward(model: Any) -> None:
    found = model(IDS)
    (getattr(found, "logits", found)).sum().backward()


def adapters(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


def trained() -> Any:
    model = adapters(llama()).train()
    return upcast.patch(model, guard=True)


def measured(model: Any) -> None:
    headroom = upcast.Headroom(model)
    backward(model)
    headroom.step()
    backward(model)


def borrowed(model: Any) -> None:
    with upcast.patched(model):
        call(model)


def interrupted(model: Any) -> None:
    """A step that guard breaks off in its backward pass."""
    with pytest.raises(upcast.UpcastError, match="not finite"):
        (model(IDS).logits.sum() * float("inf")).backward()


def unpatched(model: Any) -> None:
    call(model)
    upcast.unpatch(model)
    call(model)


def refused(model: Any) -> None:
    with pytest.raises(upcast.UpcastError):
        upcast.patch(model)


def converted(model: Any) -> None:
    model.half()


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def nothing(_: Any) -> None:
    pass


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "plain": (lambda: upcast.patch(plain()), call),
    "plain, never called": (lambda: upcast.patch(plain()), nothing),
    "plain, unpatched": (lambda: upcast.patch(plain()), unpatched),
    "plain, borrowed": (plain, borrowed),
    "plain, diagnosed": (plain, lambda model: upcast.diagnose(model, IDS)),
    "plain, patched and diagnosed": (lambda: upcast.patch(plain()), lambda model: upcast.diagnose(model, IDS)),
    "plain, searched": (plain, lambda model: upcast.search(model, IDS)),
    "plain, refused": (lambda: upcast.patch(plain()), refused),
    "plain, converted": (lambda: upcast.patch(plain()), converted),
    "plain, gradients through it": (lambda: upcast.patch(adapters(llama())), backward),
    "litgpt": (lambda: upcast.patch(litgpt_model()), call),
    "litgpt, generated": (lambda: upcast.patch(litgpt_model()), cached),
    "litgpt, generated, unpatched": (
        lambda: upcast.patch(litgpt_model()),
        lambda model: (cached(model), upcast.unpatch(model)),
    ),
    "litgpt, experts": (lambda: upcast.patch(litgpt_model("Mixtral-8x7B-v0.1")), cached),
    "litgpt, a policy": (lambda: upcast.patch(litgpt_model(), policy="norm+residual"), cached),
    "litgpt, guarded": (lambda: upcast.patch(litgpt_model(), guard=True), cached),
    "transformers": (lambda: upcast.patch(llama()), generated),
    "transformers, tied": (lambda: upcast.patch(llama(tie_word_embeddings=True)), generated),
    "transformers, unpatched": (lambda: upcast.patch(llama()), lambda model: (generated(model), unpatched(model))),
    "transformers, borrowed": (llama, borrowed),
    "transformers, a policy": (lambda: upcast.patch(llama(), policy="sensitive"), generated),
    "transformers, healed": (lambda: upcast.patch(llama(), policy="sensitive", guard=True, heal=True), generated),
    "transformers, trained": (trained, backward),
    "transformers, interrupted": (trained, interrupted),
    "transformers, measured": (trained, measured),
}


def watch(model: nn.Module) -> list[weakref.ref[Any]]:
    """References to all modules and weights, and to the bytes of those that are stored in float16."""
    parameters = list(model.parameters())
    stored = [parameter.stored for parameter in parameters if hasattr(parameter, "stored")]
    return [weakref.ref(each) for each in [*model.modules(), *parameters, *stored]]


def alive(found: list[weakref.ref[Any]]) -> list[str]:
    return [type(each()).__name__ for each in found if each() is not None]


@pytest.mark.parametrize("name", CASES)
def test_a_model_goes_with_its_last_reference(name: str) -> None:
    make, use = CASES[name]
    model = make()
    use(model)
    found = watch(model)
    del model
    assert not alive(found)


@pytest.mark.parametrize("name", ["plain", "litgpt, generated", "transformers", "transformers, a policy"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_a_copy_lives_by_itself_and_goes_as_well(name: str, copied: Callable[[Any], Any]) -> None:
    make, use = CASES[name]
    model = make()
    want = logits(model)
    found, model = watch(model), copied(model)
    assert not alive(found)  # the original went, and the copy does without
    assert torch.equal(logits(model), want)
    use(model)
    found = watch(model)
    del model
    assert not alive(found)


def logits(model: Any) -> Tensor:
    found: Any = call(model)
    return getattr(found, "logits", found).detach().clone()


# --- a forward without its module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "litgpt", "transformers"])
def test_a_shallow_copy_outlives_its_original(name: str) -> None:
    model = CASES[name][0]()
    want = logits(model)
    shallow = copy.copy(model)
    del model
    assert torch.equal(logits(shallow), want)
    assert torch.equal(logits(shallow), want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda forward: pickle.loads(pickle.dumps(forward))])
def test_a_forward_that_is_copied_alone_keeps_its_module(copied: Callable[[Any], Any]) -> None:
    layer, x = upcast.patch(nn.Linear(8, 8).eval()), torch.randn(2, 8)
    want, forward = layer(x), copied(layer.forward)
    del layer
    assert torch.equal(forward(x), want)


def test_a_forward_whose_module_is_gone_says_so() -> None:
    forward = upcast.patch(litgpt_model()).forward
    with pytest.raises(upcast.UpcastError, match=r"whose module is gone.*Keep the module"):
        forward(IDS)


# --- in bytes -----------------------------------------------------------------------------------------------------

RELOADED = """
import gc, sys, torch, transformers
from benchmarks.harness import memory
gc.disable()
ids, sizes = torch.arange(8)[None], []
for _ in range(6):
    model = transformers.LlamaForCausalLM.from_pretrained("model")
    assert type(model.lm_head.weight).__name__ == "HalfWeight"
    model.generate(ids, max_new_tokens=4, do_sample=False)
    del model
    sizes.append(memory.resident_bytes())
print(max(sizes[2:]) - sizes[1])
"""


def test_memory_is_flat_over_reloads(python_with_libraries: Run, tmp_path: Path) -> None:
    from benchmarks.harness import memory

    if not memory.supported():
        pytest.skip("this system does not tell a process how much memory it has")
    model = llama(vocab_size=20_000, hidden_size=128)
    held = sum(2 * parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    root = str(Path(__file__).parents[2])
    result = python_with_libraries("-c", RELOADED, UPCAST="1", PYTHONPATH=root, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < held / 2
