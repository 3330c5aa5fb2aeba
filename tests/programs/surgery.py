"""Programs that change a model after it is loaded: its weights, its modules, its forwards."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.programs.checkpoints import IDS, load


def _output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits[:, -1, :8]  # type: ignore[no-any-return]


def _text(model: Any) -> Any:
    return model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()


def hooks(folder: Path) -> Any:
    model, seen = load(folder), []
    layers = model.model.layers
    layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    layers[0].self_attn.o_proj.register_forward_hook(lambda module, args, output: output + 0.5)
    layers[1].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    layers[1].mlp.act_fn.register_forward_hook(lambda module, args, output: output * 0.5)
    return _output(model), _text(model), seen


def removed_hooks(folder: Path) -> Any:
    model = load(folder)
    before = _output(model)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    with_it = _output(model)
    handle.remove()
    return before, with_it, _output(model), _text(model)


def backward_hooks(folder: Path) -> Any:
    model, norms = load(folder), []
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.register_full_backward_hook(lambda module, into, out: norms.append(out[0].norm()))
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.logsumexp(-1).sum().backward()
    return norms, embedded.grad


def a_class_forward_replaced(folder: Path) -> Any:
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    model = load(folder)
    kept = LlamaRMSNorm.forward, LlamaMLP.forward
    try:
        LlamaRMSNorm.forward = lambda self, x: 2 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)  # type: ignore[method-assign]
        LlamaMLP.forward = lambda self, x: self.down_proj(torch.tanh(self.up_proj(x)))  # type: ignore[method-assign]
        return _output(model), _text(model)
    finally:
        LlamaRMSNorm.forward, LlamaMLP.forward = kept  # type: ignore[method-assign]


def an_instance_forward_replaced(folder: Path) -> Any:
    model = load(folder)
    mlp = model.model.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) + 0.25 * x
    with_it = _output(model), _text(model)
    mlp.forward = original
    return with_it, _output(model)


def a_function_replaced(folder: Path) -> Any:
    from transformers.models.llama import modeling_llama

    model = load(folder)
    kept = modeling_llama.apply_rotary_pos_emb
    try:
        modeling_llama.apply_rotary_pos_emb = lambda q, k, *_, **__: (q, 0.5 * k)
        return _output(model), _text(model)
    finally:
        modeling_llama.apply_rotary_pos_emb = kept


def linear_replaced(folder: Path) -> Any:
    model = load(folder)
    kept = nn.Linear.forward
    try:
        nn.Linear.forward = lambda self, x: torch.nn.functional.linear(x.clamp(-1, 1), self.weight)  # type: ignore[method-assign]
        return _output(model), _text(model)
    finally:
        nn.Linear.forward = kept  # type: ignore[method-assign]


def another_activation(folder: Path) -> Any:
    model = load(folder)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    return _output(model), _text(model)


def a_module_wrapped(folder: Path) -> Any:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, weights = self.inner(*args, **kwargs)
            return 0.5 * output, weights

    model = load(folder)
    for layer in model.model.layers:
        layer.self_attn = Scaled(layer.self_attn)
    return _output(model), _text(model)


def fewer_layers(folder: Path) -> Any:
    model = load(folder)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return _output(model), _text(model)


def a_layer_twice(folder: Path) -> Any:
    model = load(folder)
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList([layers[1], layers[1]])
    return _output(model)


def parts_in_a_sequential(folder: Path) -> Any:
    model = load(folder)
    mlp = model.model.layers[0].mlp
    branch = nn.Sequential(mlp.up_proj, nn.ReLU(), mlp.down_proj)
    body = load(folder, "vit", "AutoModel")
    patches = nn.Sequential(*list(body.embeddings.patch_embeddings.children()))
    with torch.no_grad():
        return branch(torch.ones(2, 32)), patches(torch.ones(1, 3, 16, 16))


def more_tokens(folder: Path) -> Any:
    torch.manual_seed(0)
    model = load(folder)
    model.resize_token_embeddings(304, mean_resizing=False)
    with torch.no_grad():
        mean = model.get_input_embeddings().weight[:300].mean(0)
        model.get_input_embeddings().weight[300:] = mean
        model.get_output_embeddings().weight[300:] = 0
    ids = torch.tensor([[5, 301, 40]])
    return model(ids).logits[:, -1, -8:], tuple(model.lm_head.weight.shape), model.config.vocab_size


def more_tokens_on_tied_weights(folder: Path) -> Any:
    model = load(folder, "gpt2")
    model.resize_token_embeddings(302, mean_resizing=False)
    with torch.no_grad():
        model.transformer.wte.weight[300:] = 0.25
    return _output(model), model.lm_head.weight is model.transformer.wte.weight, _text(model)


def fewer_tokens(folder: Path) -> Any:
    model = load(folder, "t5", "AutoModelForSeq2SeqLM")
    model.resize_token_embeddings(280)
    return model(input_ids=IDS, decoder_input_ids=IDS).logits[:, -1, :8]


def pruning(folder: Path) -> Any:
    from torch.nn.utils import prune

    model = load(folder)
    layer = model.model.layers[0].mlp.up_proj
    prune.l1_unstructured(layer, "weight", amount=0.5)
    pruned = _output(model), sorted(name for name, _ in layer.named_parameters())
    prune.remove(layer, "weight")
    return pruned, _output(model), float((layer.weight == 0).float().mean())


def parametrized(folder: Path) -> Any:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return (weight + weight.T) / 2

    model = load(folder)
    layer = model.model.layers[0].self_attn.q_proj
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    with_it = _output(model)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    return with_it, _output(model), (layer.weight - layer.weight.T).norm()


def normed_weights(folder: Path) -> Any:
    model = load(folder)
    torch.manual_seed(0)
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    nn.utils.parametrizations.spectral_norm(model.model.layers[1].mlp.down_proj)
    return _output(model)


def a_weight_deleted(folder: Path) -> Any:
    model = load(folder)
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.weight
    del layer.weight
    layer.register_buffer("weight", 0.5 * weight.detach())
    return _output(model), [name for name, _ in layer.named_buffers()]


def data_assigned(folder: Path) -> Any:
    model = load(folder)
    first, second = (layer.mlp for layer in model.model.layers)
    first.up_proj.weight.data = second.up_proj.weight.data
    first.gate_proj.weight.data = torch.eye(64)[:, :32]
    plain = nn.Linear(32, 64, bias=False)
    plain.weight.data = second.gate_proj.weight.data
    with torch.no_grad():
        plain.weight.add_(1)
        return _output(model), plain(torch.ones(1, 32)), first.up_proj.weight[:2]


def wider_data_assigned(folder: Path) -> Any:
    model = load(folder)
    head = model.lm_head
    head.weight.data = torch.cat([head.weight.data, torch.ones(4, 32)])
    head.out_features = 304
    return model(IDS).logits[:, -1, -8:]


def weights_exchanged(folder: Path) -> Any:
    model = load(folder)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    first.weight, second.weight = second.weight, first.weight
    kept = first.weight.data.clone()
    first.weight.data.copy_(second.weight.data)
    second.weight.data.copy_(kept)
    second.weight.data[0] *= 2
    return _output(model), first.weight[0], second.weight[0]


def lora_merged_by_hand(folder: Path) -> Any:
    model = load(folder)
    torch.manual_seed(0)
    a, b = torch.randn(4, 32) / 100, torch.randn(32, 4) / 100
    layer = model.model.layers[0].self_attn.q_proj
    merged = layer.weight.clone()
    for _ in range(10):
        merged += b @ a
    plain = nn.Linear(32, 32, bias=False)
    plain.weight = nn.Parameter(merged.detach())
    model.model.layers[0].self_attn.q_proj = plain
    return merged, _output(model)


def a_gradient_through_a_copy(folder: Path) -> Any:
    weight = load(folder).lm_head.weight.clone().detach()
    factors = torch.ones(4, 32, requires_grad=True)
    table = weight.clone()
    table[torch.tensor([1, 5, 7, 9])] = 2 * factors
    table = table.index_add(0, torch.tensor([1, 2, 3, 4]), factors)
    table.square().sum().backward()
    return factors.grad


def tying(folder: Path) -> Any:
    model = load(folder)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.lm_head.weight.data.mul_(0.5)
    same = model.lm_head.weight is model.model.embed_tokens.weight
    count = sum(p.numel() for p in model.parameters())
    untied = _output(model)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.clone())
    model.lm_head.weight.data.fill_(0.5)
    return same, count, untied, _output(model), model.model.embed_tokens.weight[:2]


def equal_weights(folder: Path) -> Any:
    """Written into one after the other; loaded equal, they are not one."""
    model, other = load(folder, "gpt2"), load(folder, "gpt2")
    other.transformer.h[1].load_state_dict(other.transformer.h[0].state_dict())
    other.transformer.h[0].mlp.c_fc.weight.data.fill_(0.125)
    other.transformer.h[1].attn.c_attn.weight.data.view(-1)[:5] = 0
    model.lm_head.weight.data.mul_(0.5)
    return _output(model), _output(other), other.transformer.h[1].mlp.c_fc.weight.sum()


def quantized_by_hand(folder: Path) -> Any:
    """Round every linear's rows to 8 bits, and to float16 again, which is what stores them."""
    model = load(folder)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True) / 127
            codes = (module.weight.data / scale).round().to(torch.int8)
            module.weight.data = (codes * scale).half().float()
    return _output(model), _text(model)


def low_rank_by_svd(folder: Path) -> Any:
    model = load(folder)
    mlp = model.model.layers[0].mlp
    u, s, v = torch.linalg.svd(mlp.up_proj.weight, full_matrices=False)
    mlp.up_proj = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 64, bias=False))
    mlp.up_proj[0].weight = nn.Parameter(s[:8, None] * v[:8])
    mlp.up_proj[1].weight = nn.Parameter(u[:, :8].contiguous())
    return _output(model)


def initialized_anew(folder: Path) -> Any:
    model = load(folder)
    torch.manual_seed(5)
    layer = model.model.layers[1].mlp.down_proj
    nn.init.normal_(layer.weight, std=0.25)
    layer.weight.data.copy_(layer.weight.data.half())
    nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
    nn.init.constant_(model.model.layers[0].self_attn.v_proj.weight, 0.5)
    return _output(model), layer.weight[:2]


def noise_added(folder: Path) -> Any:
    """NEFTune's way, on the weights; rounded to what float16 stores."""
    model = load(folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.125)
            weight.copy_(weight.half())
    return _output(model)


def clipped_weights(folder: Path) -> Any:
    model = load(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.clamp_(-0.25, 0.25)
        model.lm_head.weight[model.lm_head.weight > 0] = 0
        model.model.layers[0].mlp.up_proj.weight[:, ::2].zero_()
        model.model.layers[0].mlp.up_proj.weight.t()[1].fill_(0.5)
    return _output(model), sum((weight == 0).sum() for weight in model.parameters())


def cast_in_parts(folder: Path) -> Any:
    model = load(folder)
    model.lm_head.double()
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    model.model.layers[0].mlp.to(torch.bfloat16).to(torch.float32)
    model.lm_head.float()
    return dtypes, _output(model)


def a_class_exchanged(folder: Path) -> Any:
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Loud(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    model = load(folder)
    model.model.layers[0].mlp.__class__ = Loud
    return _output(model), _text(model)


def an_encoder_decoder_of_two(folder: Path) -> Any:
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    encoder = load(folder, "bert", "AutoModel")
    torch.manual_seed(0)
    decoder = load(folder, "bert", "BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
    model = EncoderDecoderModel(config=config, encoder=encoder, decoder=decoder)
    return model(input_ids=IDS, decoder_input_ids=IDS).logits[:, -1, :8]
