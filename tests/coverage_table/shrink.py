"""Transformers configs made tiny: same structure, two layers, dozens of channels."""

import inspect
from typing import Any

SIZES: dict[int, str] = {
    128: "vocab_size encoder_vocab_size decoder_vocab_size text_vocab_size vocab_size_per_layer_input "
    "max_position_embeddings n_positions n_ctx max_sequence_length seq_length max_seq_len sliding_window",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size dim_feedforward "
    "intermediate_size_mlp d_inner feed_forward_size dff mamba_d_ssm",
    32: "hidden_size d_model n_embd dim embed_dim n_embed word_embed_proj_dim embedding_size model_dim hidden_dim "
    "encoder_hidden_size input_embedding_size rnn_hidden_size lru_width image_size d_embed embedding_dim emb_dim "
    "projection_dim max_source_positions hidden_size_global vision_output_dim projector_input_dim "
    "projector_output_dim out_hidden_size pruned_heads_size",
    16: "moe_intermediate_size expert_ffn_hidden_size kv_lora_rank q_lora_rank mamba_d_state state_size "
    "ssm_state_size laurel_rank hidden_size_per_layer_input index_head_dim chunk_size mamba_chunk_size "
    "mamba_d_head",
    8: "head_dim d_kv attention_head_size patch_size qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim "
    "linear_key_head_dim linear_value_head_dim kv_channels",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts linear_num_value_heads mamba_n_heads index_n_heads num_mamba_heads n_mamba_heads_total",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks depth num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k "
    "num_experts_per_token moe_top_k linear_num_key_heads",
    1: "bos_token_id n_group topk_group",
    0: "pad_token_id num_nextn_predict_layers",
}
"""Size of a tiny model -> every name under which a Transformers config calls it."""

_BY_NAME: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
_BY_NAME["eos_token_id"] = 2


class Whole(dict[str, Any]):
    """A nested config that is given whole, not shrunk."""


def tiny(config_class: Any, **overrides: Any) -> Any:
    """Return a config of ``config_class`` in which every size that `SIZES` knows is small.

    An override for a nested config is a dictionary: what is different in that part.
    """
    accepted = inspect.signature(config_class.__init__).parameters
    default = config_class()
    sizes = {
        name: size
        for name, size in _BY_NAME.items()
        if (name in accepted or name in default.__dict__) and not isinstance(getattr(default, name, 0), (list, tuple))
    }
    nested = {}
    for name, part in _parts(default):
        changes = overrides.pop(name, {})
        nested[name] = dict(changes) if isinstance(changes, Whole) else tiny(type(part), **changes).to_dict()
    return config_class(**{**sizes, **nested, **overrides})


def _parts(config: Any) -> list[tuple[str, Any]]:
    from transformers import PretrainedConfig

    return [(name, value) for name, value in vars(config).items() if isinstance(value, PretrainedConfig)]
