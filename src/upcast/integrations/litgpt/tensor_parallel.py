"""LitGPT models divided between the ranks of a mesh: tensor parallelism over heads, MLP rows, experts, vocabulary.

Column-parallel layers (qkv, the MLP's first) hold rows of their weight, row-parallel ones (the projections) columns;
the ranks' partial results are added up in float32 between the halves of a block, once per block where both halves
read the same input. The bias of a projection belongs to rank 0. The scheme is Megatron-LM's (arXiv:1909.08053).

Each layer is LitGPT's own on smaller tensors, and each block a `DividedBlock`, which has the communication: attention,
norms and MLPs keep their fused forwards, and the native call of a block is made for each of its halves.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from upcast.checkpoint import reading
from upcast.core.errors import UpcastError
from upcast.core.forward_override import Attached, push
from upcast.core.pages import give_back_pages
from upcast.distributed import consistency
from upcast.distributed.collectives import Group
from upcast.distributed.sharding import Cut, divide_heads, even, turned
from upcast.integrations import loading
from upcast.integrations.litgpt.divided_block import DividedBlock
from upcast.integrations.litgpt.gpt import wants_last
from upcast.integrations.litgpt.versions import setting
from upcast.policy import policy as policies
from upcast.tensor.packed_weight import PackedStore, PackedWeight, packable
from upcast.tensor.store import Fallbacks

Cuts = dict[str, Cut | None]  # parameter -> what this rank takes of it; None: nothing


def load(
    model: Any,
    folder: Path,
    weights: dict[str, Tensor],
    mesh: DeviceMesh,
    policy: policies.Policy,
    kv_cache: str,
    wire: str,
) -> Any:
    """Make ``model`` (built without memory) this rank's part of it, with its part of the mapped ``weights``."""
    group = Group(_group_of(mesh), wire)
    config_file = (folder / "model_config.yaml").read_bytes()
    options = {"policy": str(policy), "kv_cache": kv_cache, "wire": wire}
    group.agree(consistency.record(config_file, weights, **options))
    group.share()
    local, known = take(weights, divide(model, group), policy.storage)
    model.load_state_dict(local, assign=True)
    model.cos, model.sin = model.rope_cache(device=torch.device("cpu"))
    loading.adopt(model, known, kv_cache, policy=policy)
    model.requires_grad_(False)  # sums over ranks have no gradient
    group.sum(torch.zeros(1))  # all have loaded: waiting for each other is over
    group.calls, group.seconds = 0, 0.0
    model.__dict__["parallel_group"] = group
    return model


def take(weights: dict[str, Tensor], cuts: Cuts, storage: str = "float16") -> tuple[dict[str, Tensor], reading.Known]:
    """Return this rank's part of the mapped weights in float16, or as it will be packed, and what rounding lost.

    One tensor at a time; one that is packed in its file is unpacked for that.
    """
    local: dict[str, Tensor] = {}
    known: reading.Known = {}
    for name, tensor in weights.items():
        if name in cuts and cuts[name] is None:
            continue
        cut = cuts.get(name)
        one = {name: tensor if cut is None else _part(tensor, cut)}
        known.update(reading.to_float16(one, storage=storage))
        local.update(one)
        if isinstance(tensor, PackedWeight):
            continue
        if one[name].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            give_back_pages(tensor)  # the part is a copy, the pages of the whole are not needed
    return local, known


def _part(tensor: Tensor, cut: Cut) -> Tensor:
    """Return what ``cut`` leaves of ``tensor``; of a packed one it is packed again, where it can be."""
    if not isinstance(tensor, PackedWeight):
        return cut.of(tensor)
    part = cut.of(tensor.stored).clone()  # not a view, which would keep the whole
    if tensor.store.bytes is not None:
        give_back_pages(tensor.store.bytes)
    matrix = packable(part)
    return part if matrix is None else PackedWeight(PackedStore(matrix, tuple(part.shape), Fallbacks()))


def _group_of(mesh: Any) -> Any:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1 or mesh.device_type != "cpu":
        raise UpcastError(
            f"mesh={mesh!r}; a model is divided over a DeviceMesh of one dimension on the CPU. "
            "Use upcast.distributed.join(), or init_device_mesh('cpu', (ranks,))."
        )
    return mesh.get_group()


# --- who takes what ---------------------------------------------------------------------------------------------------


def divide(gpt: Any, group: Group) -> Cuts:
    """Shrink the layers of ``gpt`` (on the meta device) to this rank's part, connect them, and return the cuts.

    Raises:
        UpcastError: there are more ranks than heads, MLP rows or tokens, or the structure cannot be divided.
    """
    _check(gpt.config)
    if not all(hasattr(block.mlp, "intermediate_size") or hasattr(block.mlp, "experts") for block in gpt.transformer.h):
        raise UpcastError("mesh= with LitGPT before 0.5.9; upcast divides the layers of later ones. Update litgpt.")
    cuts: Cuts = {}
    for index, block in enumerate(gpt.transformer.h):
        prefix = f"transformer.h.{index}"
        _divide_attention(block.attn, f"{prefix}.attn", index, group, cuts)
        _divide_mlp(block.mlp, f"{prefix}.mlp", index, group, cuts)
        push(block, DividedBlock(block, group))
    _divide_vocabulary(gpt, group, cuts)
    return cuts


def _check(settings: Any) -> None:
    reason = "latent attention" if setting(settings, "latent_attention") else ""
    if setting(settings, "norm_qk") and setting(settings, "norm_qk_type") == "olmo2":
        reason = "a norm over all heads"
    if reason:
        raise UpcastError(
            f"{settings.name} has {reason}, which upcast cannot divide between ranks yet. Load it without mesh."
        )


def _divide_attention(attn: Any, name: str, turn: int, group: Group, cuts: Cuts) -> None:
    """LitGPT's fused qkv holds all queries, then all keys, then all values: three ranges for each rank."""
    whole = attn.config
    parts = divide_heads(whole.n_head, whole.n_query_groups, group.size)
    part = parts[turned(parts, group.rank, turn)]
    (first, end), size = part.heads, whole.head_size
    keys, values = whole.n_head, whole.n_head + whole.n_query_groups
    ranges = [part.heads, *((at + part.groups[0], at + part.groups[1]) for at in (keys, values))]
    _cut_rows(attn.qkv, f"{name}.qkv", tuple((a * size, b * size) for a, b in ranges), cuts)
    _cut_columns(attn.proj, f"{name}.proj", (first * size, end * size), group, cuts)
    attn.config = copy.copy(whole)
    attn.config.n_head, attn.config.n_query_groups = end - first, part.groups[1] - part.groups[0]


def _divide_mlp(mlp: Any, name: str, turn: int, group: Group, cuts: Cuts) -> None:
    from litgpt.model import LLaMAMoE

    if not isinstance(mlp, LLaMAMoE):
        _divide_dense(mlp, name, turn, group, cuts)
        return
    if hasattr(mlp, "shared_experts"):
        _divide_dense(mlp.shared_experts, f"{name}.shared_experts", turn, group, cuts)
    if len(mlp.experts) < group.size:
        for index, expert in enumerate(mlp.experts):
            _divide_dense(expert, f"{name}.experts.{index}", turn + index, group, cuts)
        return
    parts = even(len(mlp.experts), group.size, "experts")
    first, end = parts[turned(parts, group.rank, turn)]
    for index, expert in enumerate(mlp.experts):
        if not first <= index < end:
            cuts.update({f"{name}.experts.{index}.{key}": None for key in expert.state_dict()})
            mlp.experts[index] = Elsewhere()


def _divide_dense(mlp: Any, name: str, turn: int, group: Group, cuts: Cuts) -> None:
    parts = even(mlp.intermediate_size, group.size, "rows of an MLP")
    part = parts[turned(parts, group.rank, turn)]
    for layer in ("fc", "fc_1", "fc_2"):
        if hasattr(mlp, layer):
            _cut_rows(getattr(mlp, layer), f"{name}.{layer}", (part,), cuts)
    _cut_columns(mlp.proj, f"{name}.proj", part, group, cuts)
    mlp.intermediate_size = part[1] - part[0]


def _divide_vocabulary(gpt: Any, group: Group, cuts: Cuts) -> None:
    embedding, head = gpt.transformer.wte, gpt.lm_head
    parts = even(embedding.num_embeddings, group.size, "tokens")
    part = parts[group.rank]
    cuts["transformer.wte.weight"] = Cut(0, (part,))
    gpt.transformer.wte = VocabularyEmbedding(part, embedding.embedding_dim, group)
    _cut_rows(head, "lm_head", (part,), cuts)
    head.register_forward_pre_hook(LastPosition(gpt))
    head.register_forward_hook(Concatenate(group, [end - start for start, end in parts]))


def _cut_rows(linear: nn.Linear, name: str, ranges: tuple[tuple[int, int], ...], cuts: Cuts) -> None:
    """Keep these outputs."""
    cut = cuts[f"{name}.weight"] = Cut(0, ranges)
    linear.weight = nn.Parameter(cut.of(linear.weight.detach()))
    linear.out_features = linear.weight.shape[0]
    if linear.bias is not None:
        cuts[f"{name}.bias"] = cut
        linear.bias = nn.Parameter(cut.of(linear.bias.detach()))


def _cut_columns(linear: nn.Linear, name: str, part: tuple[int, int], group: Group, cuts: Cuts) -> None:
    """Keep these inputs; the bias is added by one rank only, since the results are summed."""
    cut = cuts[f"{name}.weight"] = Cut(1, (part,))
    linear.weight = nn.Parameter(cut.of(linear.weight.detach()))
    linear.in_features = linear.weight.shape[1]
    if linear.bias is not None and group.rank:
        cuts[f"{name}.bias"] = None
        linear.register_parameter("bias", None)


# --- what runs --------------------------------------------------------------------------------------------------------


class Concatenate:
    """Forward hook: the results of all ranks side by side, where rank r gives ``sizes[r]`` of them."""

    def __init__(self, group: Group, sizes: list[int]) -> None:
        self.group, self.sizes = group, sizes

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.group.concatenate(output, self.sizes)


class LastPosition(Attached):
    """Forward pre-hook of a GPT's head: only the last position, in loops that read no other."""

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][:, -1:],) if wants_last(self.module) else args


class Elsewhere(nn.Module):
    """An expert that another rank holds: it adds nothing here."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros of the shape of ``x`` (tokens, n_embd), without memory."""
        return x.new_zeros(1).expand_as(x)


class VocabularyEmbedding(nn.Embedding):
    """The embeddings of the tokens in ``part`` (first, end); the ranks' results add up to those of all tokens."""

    def __init__(self, part: tuple[int, int], width: int, group: Group) -> None:
        super().__init__(part[1] - part[0], width, device="meta")
        self.first, self.group = part[0], group

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings (..., width) of token ids of the whole vocabulary."""
        local = input - self.first
        outside = (local < 0) | (local >= self.num_embeddings)
        found = super().forward(local.masked_fill(outside, 0))
        return self.group.sum(found.masked_fill(outside.unsqueeze(-1), 0.0))
