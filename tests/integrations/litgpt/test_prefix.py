"""LLM.generate with prompts that begin alike: what the caches hold is not computed again, and nothing stale is used."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import upcast
from tests.conftest import relative_error
from tests.fused_models import make, without_fusion
from upcast import kernels
from upcast.integrations.litgpt import gpt as litgpt_stack
from upcast.integrations.litgpt.prefix_cache import caches_of

pytestmark = pytest.mark.usefixtures("one_thread")

NEW = 5  # tokens that each call asks for
FIRST = list(range(7, 27))
LLAMA, WINDOWS = "SmolLM2-135M-Instruct", "Gemma-3-4b-it"  # the windows of small_config hold 16 positions

# What happens to the model between two prompts, of which the second begins like the first: all is computed again.
CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight written": lambda gpt: gpt.transformer.h[1].attn.qkv.weight.stored.mul_(2),
    "a weight replaced": lambda gpt: gpt.load_state_dict(
        {name: tensor * 1.5 for name, tensor in make(LLAMA).state_dict().items()}, assign=True
    ),
    "an embedding replaced": lambda gpt: setattr(gpt.transformer, "wte", torch.nn.Embedding(320, gpt.config.n_embd)),
    "a norm's eps": lambda gpt: setattr(gpt.transformer.h[2].norm_1, "eps", 0.3),
    "caches reset": lambda gpt: [cache.reset_parameters() for cache in caches_of(gpt)],
    "caches made anew": lambda gpt: gpt.set_kv_cache(1, 64),
    "a cache written": lambda gpt: caches_of(gpt)[0](torch.arange(2), *_rows(gpt, 2)),
    "a block called": lambda gpt: gpt.transformer.h[0](*_block_arguments(gpt)),
    "other tokens, unfused": lambda gpt: gpt(torch.tensor([[5, 6]]), torch.arange(2).unsqueeze(0)),
    "a batch": lambda gpt: (gpt.set_kv_cache(2, 64), gpt(torch.tensor([FIRST[:5], FIRST[:5]]), torch.arange(5))),
}


def _rows(gpt: Any, time: int) -> tuple[Tensor, Tensor]:
    return (torch.ones(1, gpt.config.n_query_groups, time, gpt.config.head_size),) * 2


def _block_arguments(gpt: Any) -> tuple[Any, ...]:
    gpt.mask_cache = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    x, positions = torch.ones(1, 3, gpt.config.n_embd), torch.arange(3)
    return x, gpt.cos[:3].unsqueeze(0), gpt.sin[:3].unsqueeze(0), gpt.mask_cache[:, :, :3], positions


class Tokens:
    """A preprocessor whose text is tokens already."""

    device = torch.device("cpu")

    class tokenizer:
        eos_id = -1

    @staticmethod
    def encode(text: Any) -> Tensor:
        return torch.tensor(text)

    @staticmethod
    def decode(tokens: Tensor) -> list[int]:
        found: list[int] = tokens.tolist()
        return found


class Style:
    @staticmethod
    def apply(prompt: Any, **_: Any) -> Any:
        return prompt


def llm_of(gpt: Any) -> Any:
    from litgpt.api import LLM

    return LLM(model=gpt, preprocessor=Tokens(), prompt_style=Style(), config=gpt.config)


def say(llm: Any, prompt: list[int], **options: Any) -> list[int]:
    answer: list[int] = llm.generate(prompt, max_new_tokens=NEW, temperature=0.0, **options)
    return answer


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Without gradients, and on one thread: tests of tiny models would mostly wait for the other one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of every call of the first kernel of a model of three blocks."""
    widths: list[int] = []
    block, blocks = kernels.native.block, kernels.native.blocks

    def count(x: Tensor, *rest: Any) -> Any:
        widths.append(x.shape[1])
        return block(x, *rest)

    def count_all(x: Tensor, places: Any, steps: Any, *rest: Any) -> Any:
        widths.extend([x.shape[1]] * len(steps))
        return blocks(x, places, steps, *rest)

    monkeypatch.setattr(kernels.native, "block", count)
    monkeypatch.setattr(kernels.native, "blocks", count_all)
    return widths


def taken(widths: list[int], layers: int = 3) -> list[int]:
    found = widths[::layers]
    widths.clear()
    return found


@pytest.mark.parametrize("kv_cache", ["float16", "float32"])
def test_a_conversation_computes_each_token_once(kv_cache: str, computed: list[int]) -> None:
    model = upcast.patch(make(LLAMA), kv_cache=kv_cache)
    plain = llm_of(without_fusion(model))
    llm, prompt = llm_of(model), FIRST
    known = 0
    for turn in range(4):
        answer = say(llm, prompt)
        assert taken(computed) == [len(prompt) - known] + [1] * (NEW - 1)
        assert answer == say(plain, prompt)
        known = len(prompt) + NEW - 1  # the last token of the answer was never fed back
        prompt = [*prompt, *answer, 40 + turn, 50]


def test_logits_are_those_of_the_whole_prompt() -> None:
    from litgpt.generate import base

    model = upcast.patch(make(LLAMA), kv_cache="float32")
    plain = without_fusion(model)
    say(llm_of(model), FIRST)
    logits: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(base, "sample", lambda found, **_: (logits.append(found), torch.zeros(1))[1])
        prompt = torch.tensor([[*FIRST[:12], 3, 4, 5]])
        base.next_token(model, torch.arange(15), prompt, temperature=0.0)
    assert relative_error(logits[0][:, -1], plain(prompt)[:, -1]) < 1e-5
    assert logits[0].shape[1] == 1


# prompt after FIRST -> positions computed for it
PROMPTS = {
    "the same": (FIRST, 1),
    "shorter": (FIRST[:8], 1),
    "another end": ([*FIRST[:9], 3, 4], 2),
    "another begin": ([1, *FIRST], 21),
    "one token": (FIRST[:1], 1),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, stream: bool, computed: list[int]) -> None:
    prompt, positions = PROMPTS[name]
    model = upcast.patch(make(LLAMA))
    llm, plain = llm_of(model), llm_of(without_fusion(model))
    say(llm, FIRST)
    taken(computed)
    answer = say(llm, prompt, stream=stream)
    got = [token for part in answer for token in part] if stream else answer
    assert taken(computed) == [positions] + [1] * (NEW - 1)
    assert got == say(plain, prompt)


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_stale_is_used(name: str, computed: list[int]) -> None:
    model = upcast.patch(make(LLAMA))
    llm = llm_of(model)
    say(llm, FIRST)
    with torch.inference_mode("weight" not in name):  # LLM.generate's caches are made in inference mode
        CHANGES[name](model)
    taken(computed)
    prompt = [*FIRST, 3]
    answer = say(llm, prompt)
    assert len(prompt) in taken(computed)[:1] or name == "an embedding replaced"  # one in float32 is not fused
    assert answer == say(llm_of(without_fusion(model)), prompt)


def test_a_watched_block_sees_the_whole_prompt() -> None:
    model = upcast.patch(make(LLAMA))
    llm = llm_of(model)
    say(llm, FIRST)
    seen: list[int] = []
    model.transformer.h[1].mlp.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    say(llm, FIRST)
    assert seen == [len(FIRST)] + [1] * (NEW - 1)


def test_a_window_that_went_around_has_lost_the_beginning(computed: list[int]) -> None:
    model = upcast.patch(make(WINDOWS))
    llm, plain = llm_of(model), llm_of(without_fusion(model))
    layers = model.config.n_layer
    for prompt, first in [(FIRST[:5], 5), (FIRST[:7], 2), (FIRST[:14], 7), (FIRST[:15], 15)]:
        computed.clear()
        assert say(llm, prompt) == say(plain, prompt)
        assert taken(computed, layers)[0] == first


def test_an_interrupted_prompt_leaves_nothing_to_use(monkeypatch: pytest.MonkeyPatch, computed: list[int]) -> None:
    model = upcast.patch(make(LLAMA))
    llm = llm_of(model)
    say(llm, FIRST)
    block, calls = kernels.native.block, [0]

    def interrupt(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return block(*args)

    with monkeypatch.context() as patch:
        patch.setattr(litgpt_stack, "_AT_ONCE", 0)  # between blocks, as a long prompt is
        patch.setattr(kernels.native, "block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            say(llm, [*FIRST[:3], 9, 9, 9])
    taken(computed)
    say(llm, FIRST)
    assert taken(computed)[0] == len(FIRST)


def test_a_layer_that_went_to_float32_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(LLAMA)
    with torch.no_grad():
        model.transformer.h[1].attn.qkv.weight[model.config.n_head * model.config.head_size :] *= 30
        model.transformer.h[1].norm_1.weight *= 3e4
    llm = llm_of(upcast.patch(model))
    plain = llm_of(without_fusion(model))
    for prompt in (FIRST, [*FIRST, 3], [*FIRST, 3, 4, 5, 6, 7, 8, 9]):
        assert say(llm, prompt) == say(plain, prompt)
    assert capsys.readouterr().err.count("goes to float32") >= 1


def test_unpatch_leaves_nothing() -> None:
    from litgpt.api import LLM

    model = upcast.patch(make(LLAMA))
    say(llm_of(model), FIRST)
    assert hasattr(LLM.generate, "_upcast_original")
    upcast.unpatch(model)
    for module in (model, *caches_of(model)):
        assert not [name for name, value in vars(module).items() if "upcast" in f"{name} {type(value)}"]


def test_weights_made_in_inference_mode_are_known_by_what_they_are(computed: list[int]) -> None:
    with torch.inference_mode():
        model = upcast.patch(make(LLAMA))
    llm = llm_of(model)
    say(llm, FIRST)
    say(llm, FIRST)
    assert taken(computed) == [len(FIRST), *[1] * (NEW - 1), *[1] * NEW]
    with torch.inference_mode():
        model.transformer.h[0].norm_1.weight.mul_(2)
    assert say(llm, FIRST) == say(llm_of(without_fusion(model)), FIRST)
    assert taken(computed)[0] == len(FIRST)


def test_weights_that_are_the_same_again_are_the_same(computed: list[int]) -> None:
    model = upcast.patch(make(LLAMA))
    llm = llm_of(model)
    say(llm, FIRST)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    model.transformer.h[0].attn.qkv.weight.data.mul_(2)
    model.transformer.h[0].attn.qkv.weight.data.mul_(0.5)
    taken(computed)
    say(llm, FIRST)
    assert taken(computed) == [1] * NEW


def test_of_a_streamed_answer_only_the_prompt_counts(computed: list[int]) -> None:
    """Whoever reads it may write to the model between two tokens, and write back."""
    model = upcast.patch(make(LLAMA), kv_cache="float32")
    llm, prompt = llm_of(model), [*FIRST]
    weight = model.transformer.h[0].norm_1.weight.data
    for part in llm.generate(prompt, max_new_tokens=NEW, temperature=0.0, stream=True):
        prompt += part
        weight.mul_(2)
    weight.mul_(0.5**NEW)
    taken(computed)
    answer = say(llm, [*prompt, 3])
    assert taken(computed)[0] == NEW + 1
    assert answer == say(llm_of(without_fusion(model)), [*prompt, 3])


@pytest.mark.parametrize("written", [False, True])
def test_a_stream_begins_when_it_is_read(written: bool, computed: list[int]) -> None:
    model = upcast.patch(make(LLAMA))
    llm = llm_of(model)
    say(llm, FIRST)
    taken(computed)
    stream = llm.generate(FIRST, max_new_tokens=NEW, temperature=0.0, stream=True)
    if written:
        caches_of(model)[1].v.data.mul_(2)
    answer = [token for part in stream for token in part]
    assert taken(computed)[0] == (len(FIRST) if written else 1)
    assert answer == say(llm_of(without_fusion(model)), FIRST)


@pytest.mark.parametrize("more", [0, 40], ids=["the same caches", "longer caches"])
@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "watched"])
def test_nothing_of_the_prompt_before_is_behind_the_next_one(more: int, hooked: bool) -> None:
    model = upcast.patch(make(LLAMA))
    llm, norm = llm_of(model), model.transformer.h[0].norm_1
    norm.weight.data[0] = float("nan")  # and all keys and values, which LitGPT's own forward multiplies by zero
    say(llm, [*FIRST, *FIRST])
    norm.weight.data[0] = 1
    if hooked:
        norm.register_forward_hook(lambda *_: None)
    prompt = [*FIRST[:9], *range(40, 40 + more)]
    assert say(llm, prompt) == say(llm_of(without_fusion(model)), prompt)
    for cache in caches_of(model):
        assert not cache.k[:, :, len(prompt) + NEW :].any()
        assert not cache.v[:, :, len(prompt) + NEW :].any()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_benchmark_measures_whole_prompts(stream: bool, computed: list[int]) -> None:
    model = upcast.patch(make(LLAMA))
    llm = llm_of(model)
    llm.preprocessor.encode = lambda text: torch.tensor(text if isinstance(text, list) else [1])
    llm.preprocessor.decode = str
    say(llm, FIRST)
    taken(computed)
    _, numbers = llm.benchmark(num_iterations=3, prompt=FIRST, max_new_tokens=NEW, temperature=0.0, stream=stream)
    assert len(numbers["Seconds total"]) == 3
    runs = 3 if stream else 6  # LitGPT generates twice for each where it does not stream
    assert taken(computed) == [len(FIRST), *[1] * (NEW - 1)] * runs
    say(llm, FIRST)
    say(llm, FIRST)
    assert taken(computed)[NEW] == 1


@pytest.mark.parametrize("how", ["clear_kv_cache", "set_kv_cache", "generate"])
def test_caches_that_are_given_up_go(how: str) -> None:
    model = upcast.patch(make(LLAMA))
    llm = llm_of(model)
    say(llm, FIRST)
    before = [weakref.ref(each) for cache in caches_of(model) for each in (cache, cache.k, cache.v)]
    if how == "generate":
        say(llm, [*FIRST, *FIRST])  # which makes longer ones
    else:
        getattr(model, how)(*([1, 64] if how == "set_kv_cache" else []))
    assert not any(each() is not None for each in before)
