"""Small models drawn at random from all decoder families that the installed transformers knows.

No family has a recipe of its own: a config class is asked for its defaults, and whatever in them is a size, a switch, a
multiplier or a list of kinds of layers is drawn anew by its name, so that a family that a later transformers brings is
drawn as well. What transformers itself cannot build or run is drawn again.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 320
LARGEST = 200 * 10**6
"""Bytes of weights that a drawn model may have."""

# Every model type with the classes of its config and of its causal language model.
DECODERS: dict[str, tuple[str, str]] = {
    kind: (CONFIG_MAPPING_NAMES[kind], name if isinstance(name, str) else name[0])
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
}

Draw = Callable[["Sizes"], Any]


class Sizes:
    """The sizes that have to fit together, drawn once for a config and its parts."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)
        pick = self.rng.choice
        self.heads = pick((2, 4))
        self.head_dim = pick((4, 8, 12))
        self.hidden = self.heads * self.head_dim
        self.kv = pick([n for n in (1, 2, 4) if self.heads % n == 0])
        self.layers = pick((2, 3, 4))
        self.experts = pick((2, 4))


def _of(*values: Any) -> Draw:
    return lambda sizes: sizes.rng.choice(values)


def _constant(value: Any) -> Draw:
    return lambda _: value


_HIDDEN: Draw = lambda sizes: sizes.hidden  # noqa: E731
_INNER = _of(24, 32, 48)
_EXPERTS: Draw = lambda sizes: sizes.experts  # noqa: E731

RULES: dict[str, Draw] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "lru_width", "emb_dim"), _HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), lambda s: s.layers),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), lambda s: s.layers),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), lambda s: s.heads),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads"), lambda s: s.heads),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), lambda s: s.heads),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "kv_n_heads"), lambda s: s.kv),
    **dict.fromkeys(("kv_channels", "dim_head", "swa_head_dim"), lambda s: s.head_dim),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff", "ffn_hidden_size"), _INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), _INNER),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim"), _INNER),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), _INNER),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), _constant(256)),
    **dict.fromkeys(("model_max_length", "max_target_positions", "max_source_positions"), _constant(256)),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "sliding_window_size"), _of(4, 8, 64)),
    **dict.fromkeys(("attention_chunk_size", "local_attention"), _of(8, 64)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), _of(1, 2)),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), _of(1, 2)),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), _constant(1)),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), _of(0, 1)),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim", "gated_norm_rank", "adapter_rank"), _of(8, 16)),
    **dict.fromkeys(("qk_rope_head_dim", "d_rel"), _of(4, 8)),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), _of(4, 8)),
    **dict.fromkeys(("index_topk", "rel_extent"), _of(8, 64)),
    **dict.fromkeys(("index_n_heads", "rotary_dim"), _of(2, 4)),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), _constant(VOCAB)),
    **dict.fromkeys(("hidden_size_per_layer_input", "router_hidden_size"), _of(8, 16)),
    **dict.fromkeys(("initializer_range", "init_std", "embedding_initializer_range"), _constant(0.2)),
    # State spaces, convolutions and linear attention.
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), _of(4, 8)),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), lambda s: s.heads * 2),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), lambda s: s.head_dim),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups", "n_mamba_heads"), _of(1, 2)),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), _of(2, 4)),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), _of(4, 64)),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "conv1d_width", "linear_conv_kernel_dim"), _of(2, 4)),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), _of(4, 8)),
    "mamba_d_ssm": lambda s: 2 * s.hidden,
    "linear_num_key_heads": _constant(2),
    "linear_num_value_heads": _of(2, 4),
    "num_kv_shared_layers": _constant(0),
    "attn_layer_period": _constant(2),
    "attn_layer_offset": _of(0, 1),
    "expert_layer_period": _of(1, 2),
    "expert_layer_offset": _constant(0),
    "encoder_hash_byte_group_vocab": _constant(64),
    "image_size": _constant(16),
    "patch_size": _constant(4),
}
SWITCHES = frozenset(
    {
        "attention_bias",
        "add_bias_linear",
        "bias",
        "use_bias",
        "mlp_bias",
        "qkv_bias",
        "use_qkv_bias",
        "attention_out_bias",
        "conv_bias",
        "use_conv_bias",
        "mamba_conv_bias",
        "mamba_proj_bias",
        "tie_word_embeddings",
        "scale_embedding",
        "parallel_attn",
        "alibi",
        "multi_query",
        "new_decoder_architecture",
        "use_parallel_residual",
        "qk_layernorm",
        "use_qk_norm",
        "norm_topk_prob",
        "moe_renormalize",
        "do_layer_norm_before",
        "use_post_norm",
        "use_sandwich_norm",
        "use_attention_gate",
        "attention_k_eq_v",
        "use_double_wide_mlp",
        "enable_moe_block",
        "mamba_rms_norm",
        "mamba_norm_before_gate",
        "use_shared_attention_adapter",
        "use_mem_rope",
        "rope_interleave",
        "lm_head_bias",
        "is_moe",
        "gating",
        "norm_bias",
        "add_out_norm",
        "residual_in_fp32",
        "use_expert_bias",
        "linear_allow_neg_eigval",
        "reorder_and_upcast_attn",
        "scale_attn_by_inverse_layer_idx",
        "is_decoder",
    }
)
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
OPTIONAL = ("n_inner", "q_lora_rank", "sliding_window")
KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
# Computed by the config itself from what is given.
COMPUTED = ("per_layer_config", "qk_head_dim", "mtp_layers_block_type", "full_attn_idxs", "hybrid_layer_ids")


def _multiplier(name: str, value: Any) -> bool:
    scale = any(word in name for word in ("multiplier", "scaling", "scale_depth", "scale_emb", "route_scale"))
    return scale and isinstance(value, float) and value > 0


def drawn_sizes(default: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """What a config is given in place of its defaults.

    Args:
        default: the attributes of a config as its class makes it.
        sizes: what fits together.
    """
    rng, given = sizes.rng, {}
    for name, value in default.items():
        if name in COMPUTED:
            continue
        if isinstance(value, tf.PreTrainedConfig):
            given[name] = drawn_sizes(_attributes(value), sizes)
        elif name in KINDS_OF_LAYERS and isinstance(value, (list, tuple)) and value:
            given[name] = _kinds(list(dict.fromkeys(value)), sizes)
        elif name == "head_dim" and "qk_rope_head_dim" not in default:
            given[name] = rng.choice((sizes.head_dim, sizes.head_dim, 8))
        elif name in SPECIALS:
            given[name] = value if value is None else SPECIALS[name]
        elif name in RULES and (value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))):
            drawn = RULES[name](sizes)
            given[name] = None if value is None and name in OPTIONAL and rng.random() < 0.5 else drawn
        elif name in SWITCHES and isinstance(value, bool):
            given[name] = rng.random() < 0.5
        elif _multiplier(name, value):
            given[name] = rng.choice((value, 0.5, 1.5))
    return {**given, **_tied_together(default, sizes)}


def _tied_together(default: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Sizes that some architectures want to be the product of others."""
    given: dict[str, Any] = {}
    if "kv_lora_rank" in default and "num_key_value_heads" in default:
        given["num_key_value_heads"] = sizes.heads
    if "expand" in default and "num_heads" in default:  # Mamba-2
        given |= {"num_heads": 2 * sizes.heads, "head_dim": sizes.head_dim, "expand": 2}
    if "mamba_headdim" in default:
        given |= {"n_mamba_heads": 2 * sizes.heads, "mamba_headdim": sizes.head_dim, "mamba_expand": 2}
    if "attn_layer_indices" in default:
        given["attn_layer_indices"] = [sizes.rng.randrange(sizes.layers)]
    if "attention_types" in default:
        given["attention_types"] = [[["global"], 1], [["local"], sizes.layers - 1]]
    if "conv_L_cache" in default and default.get("layer_types") is None:
        given["layer_types"] = _kinds(["conv", "full_attention"], sizes)
    return given


def _kinds(found: list[Any], sizes: Sizes) -> list[Any]:
    """A kind for each layer, each known one at least once where there is room."""
    if found == ["linear_attention"]:
        found = ["full_attention", "linear_attention"]
    kinds = [*found, *(sizes.rng.choice(found) for _ in range(sizes.layers))][: sizes.layers]
    sizes.rng.shuffle(kinds)
    return kinds


def _attributes(config: tf.PreTrainedConfig) -> dict[str, Any]:
    """What may be given to the class of a config, with what it has."""
    taken = set(inspect.signature(type(config)).parameters)
    return {name: value for name, value in vars(config).items() if name in taken or name in config.to_dict()}


def draw(kind: str, seed: int) -> Any:
    """A model of one type in evaluation mode, float32.

    Args:
        kind: the model type.
        seed: says which.

    Returns:
        The model; None where the drawn sizes are too large.

    Raises:
        Exception: whatever transformers says to sizes that do not fit together.
    """
    config_class, model_class = (getattr(tf, name) for name in DECODERS[kind])
    sizes = Sizes(f"{kind}/{seed}")
    config = config_class(**drawn_sizes(_attributes(config_class()), sizes))
    with torch.device("meta"):
        empty = model_class(config)
    if sum(one.numel() * one.element_size() for one in (*empty.parameters(), *empty.buffers())) > LARGEST:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
