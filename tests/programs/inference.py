"""Programs that run a model, and tools that look at it or rewrite it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.programs.checkpoints import IDS, load

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def _output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits[:, -1, :8]  # type: ignore[no-any-return]


def generation(folder: Path) -> Any:
    """Every way to choose the next token."""
    model, found = load(folder), {}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
        "nucleus": {"do_sample": True, "top_p": 0.9},
        "min_p": {"do_sample": True, "min_p": 0.05},
        "beams": {"num_beams": 3},
        "beam samples": {"num_beams": 2, "do_sample": True},
        "several": {"do_sample": True, "num_return_sequences": 2},
        "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "uncached": {"use_cache": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
    }
    for name, options in ways.items():
        ids = IDS[:1] if name == "prompt lookup" else IDS
        torch.manual_seed(0)
        found[name] = model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options}).tolist()
    return found


def generation_with_scores(folder: Path) -> Any:
    output = load(folder).generate(IDS, return_dict_in_generate=True, output_scores=True, **GREEDY)
    return output.sequences.tolist(), [score[:, :4] for score in output.scores]


def generation_pickled(folder: Path) -> Any:
    import pickle

    output = load(folder).generate(IDS, return_dict_in_generate=True, **GREEDY)
    again = pickle.loads(pickle.dumps(output))
    return again.sequences.tolist(), again.past_key_values.get_seq_length()


def assisted_generation(folder: Path) -> Any:
    model, draft = load(folder), load(folder, "tied")
    return model.generate(IDS[:1], assistant_model=draft, **GREEDY).tolist()


def generation_of_every_family(folder: Path) -> Any:
    found = {name: load(folder, name).generate(IDS, **GREEDY).tolist() for name in ("gpt2", "mixtral", "mamba", "tied")}
    seq2seq = load(folder, "t5", "AutoModelForSeq2SeqLM")
    return {**found, "t5": seq2seq.generate(IDS, num_beams=2, **GREEDY).tolist()}


def generation_under_autocast(folder: Path) -> Any:
    """bfloat16's digits differ with the order of additions, so that only what it is made of is compared."""
    model = load(folder)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(IDS).logits
        text = model.generate(IDS, **GREEDY)
    return str(logits.dtype), list(text.shape), (logits.float() - model(IDS).logits).norm() < 0.05 * logits.norm()


def manual_decoding(folder: Path) -> Any:
    model, ids, cache, tokens = load(folder), IDS[:1], None, []
    with torch.inference_mode():
        for _ in range(8):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    return tokens, [tuple(layer.keys.shape) for layer in cache.layers]  # type: ignore[union-attr]


def decoding_without_a_cache(folder: Path) -> Any:
    model, ids = load(folder, "gpt2"), IDS
    for _ in range(4):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids.tolist()


def a_cache_of_ones_own(folder: Path) -> Any:
    from transformers import DynamicCache

    model, cache = load(folder), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :5], past_key_values=cache)
        cache.crop(4)
        logits = model(IDS[:, 4:], past_key_values=cache).logits[:, -1, :8]
    return logits, cache.get_seq_length()


def padded_batch(folder: Path) -> Any:
    ids = torch.tensor([[0, 0, 0, 9, 12], [4, 8, 15, 16, 23]])
    return load(folder).generate(ids, attention_mask=(ids > 0).long(), **GREEDY).tolist()


def pipeline(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers import pipeline as make

    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    writer = make("text-generation", model=load(folder), tokenizer=tokenizer)
    reader = make("feature-extraction", model=str(folder / "bert"), tokenizer=tokenizer, dtype=torch.float32)
    text = writer("What do llamas eat?", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    return text, torch.tensor(reader("A llama"))[0, :, :4]


def features(folder: Path) -> Any:
    bert, vit = load(folder, "bert", "AutoModel"), load(folder, "vit", "AutoModel")
    torch.manual_seed(0)
    with torch.inference_mode():
        words = bert(IDS, output_hidden_states=True)
        picture = vit(torch.randn(2, 3, 16, 16))
    return [state.mean(1)[:, :4] for state in words.hidden_states], picture.pooler_output[:, :4]


def similar_tokens(folder: Path) -> Any:
    table = load(folder).get_input_embeddings().weight
    normed = nn.functional.normalize(table, dim=-1)
    nearest = (normed @ normed[IDS[0]].T).topk(3, dim=0)
    distances = torch.cdist(table[:4], table[4:8])
    return (
        nearest.indices.tolist(),
        nearest.values,
        distances,
        nn.functional.cosine_similarity(table[0], table[1], dim=0),
    )


def perplexity(folder: Path) -> Any:
    model = load(folder)
    with torch.no_grad():
        return [model(row[None], labels=row[None]).loss.exp() for row in IDS]


def saliency(folder: Path) -> Any:
    model = load(folder)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    model.requires_grad_(False)
    model(inputs_embeds=embedded).logits[:, -1].amax(-1).sum().backward()
    return embedded.grad.norm(dim=-1)


def saliency_without_freezing(folder: Path) -> Any:
    model = load(folder, "gpt2").eval()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    score = model(inputs_embeds=embedded).logits[:, -1].amax(-1).sum()
    return torch.autograd.grad(score, embedded)[0].norm(dim=-1)


def half_embeddings(folder: Path) -> Any:
    """Embeddings that somebody computed in bfloat16."""
    model = load(folder)
    embedded = model.get_input_embeddings()(IDS).to(torch.bfloat16).float()
    return model(inputs_embeds=embedded).logits[:, -1, :8]


def logit_lens(folder: Path) -> Any:
    model = load(folder)
    states = model(IDS, output_hidden_states=True).hidden_states
    return [model.lm_head(model.model.norm(state[:, -1])).argmax(-1).tolist() for state in states]


def attention_maps(folder: Path) -> Any:
    model = load(folder, attn_implementation="eager")
    return [weights[:, :, -1] for weights in model(IDS, output_attentions=True).attentions]


def steering(folder: Path) -> Any:
    model = load(folder)
    direction = model.lm_head.weight[7] - model.lm_head.weight[9]
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output + direction)
    steered = model.generate(IDS, **GREEDY).tolist()
    handle.remove()
    return steered, model.generate(IDS, **GREEDY).tolist()


def traced(folder: Path) -> Any:
    model = load(folder, "vit", "AutoModel")
    picture = torch.ones(1, 3, 16, 16)
    with torch.no_grad():
        program = torch.jit.trace(model, picture, strict=False, check_trace=False)
        program.save(str(folder / "traced.pt"))
        again = torch.jit.load(str(folder / "traced.pt"))
        return again(0.5 * picture)["last_hidden_state"][0, :, :4]


def exported(folder: Path) -> Any:
    model = load(folder, "vit", "AutoModel")
    picture = torch.ones(1, 3, 16, 16)
    program = torch.export.export(model, (picture,))
    return program.module()(0.5 * picture).last_hidden_state[0, :, :4]


def functional_calls(folder: Path) -> Any:
    model = load(folder)
    weights = {name: 0.5 * weight for name, weight in model.named_parameters() if "mlp" in name}
    with torch.no_grad():
        halved = torch.func.functional_call(model, weights, (IDS,)).logits[:, -1, :8]
    return halved, _output(model)


def derivatives(folder: Path) -> Any:
    """torch.func over the activations."""
    mlp = load(folder).model.layers[0].mlp
    x, tangent = torch.linspace(-1, 1, 32), torch.ones(32)
    batch = torch.stack([x, -x])
    return (
        torch.func.vmap(mlp)(batch),
        torch.func.jvp(mlp, (x,), (tangent,))[1],
        torch.func.vjp(mlp, x)[1](tangent)[0],
        torch.func.jacrev(mlp)(x)[:2],
        torch.func.grad(lambda each: mlp(each).square().sum())(x),
    )


def sizes(folder: Path) -> Any:
    model = load(folder, "tied")
    return model.num_parameters(), sorted({str(p.dtype) for p in model.parameters()}), model.dtype, str(model.device)


def names_and_layers(folder: Path) -> Any:
    model = load(folder)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names, [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]


def flops(folder: Path) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    model = load(folder)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(IDS)
    return counter.get_total_flops()


def threads(folder: Path) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    model = load(folder).eval()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(_output, [model, model, model]))


def moved_about(folder: Path) -> Any:
    model = load(folder).cpu().to("cpu").float().eval().requires_grad_(False)
    model.share_memory()
    return _output(model), [p.is_shared() for p in model.parameters()][:2], model.training


def another_default_dtype(folder: Path) -> Any:
    model = load(folder)
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight = model.lm_head.weight
        made = [torch.zeros_like(weight), weight.new_zeros(2), torch.ones(2).to(weight), weight.clone(), weight + 1]
        return [str(each.dtype) for each in made], _output(model.cpu())
    finally:
        torch.set_default_dtype(torch.float32)


def offloaded(folder: Path) -> Any:
    from accelerate import cpu_offload

    model = load(folder)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return _output(model)


def weights_plotted(folder: Path) -> Any:
    """What a notebook asks of a weight."""
    weight = load(folder).lm_head.weight
    return {
        "histogram": torch.histc(weight.detach(), bins=5),
        "norms": weight.norm(dim=1)[:5],
        "rank": int(torch.linalg.matrix_rank(weight)),
        "quantiles": torch.quantile(weight[:50].float(), torch.tensor([0.1, 0.9])),
        "text": str(weight.dtype) + str(tuple(weight.shape)),
        "list": weight[0, :3].tolist(),
        "item": weight[1, 1].item(),
        "equal": torch.equal(weight, weight.clone()),
        "sorted": weight.flatten().sort().values[:3],
        "conversions": [str(weight.to(d).dtype) for d in (torch.float16, torch.bfloat16, torch.float64)],
        "facts": [weight.numel(), weight.is_leaf, weight.requires_grad, weight.is_contiguous(), weight.stride()],
    }
