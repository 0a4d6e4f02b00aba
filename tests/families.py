"""Tiny models of many families, randomly initialised and offline: 4 blocks, width 32, vocabulary 320.

The weights are large enough that a change in one block is seen in the logits and in the greedy tokens. Every build of a
name gives the same weights, whatever was built before, and leaves the global random state as it was.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCAB = 320
HIDDEN = 32
BLOCKS = 4
MAX_POSITIONS = 256

# Ids that end or pad nothing: greedy decoding of a random model must run to the length that was asked.
QUIET = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "initializer_range": 0.2}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": MAX_POSITIONS}
GROUPED = {**SIZES, **HEADS, "num_key_value_heads": 2, "intermediate_size": 48}


def _llama() -> PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, **QUIET))


def _mistral() -> PreTrainedModel:
    return tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, **QUIET, sliding_window=8))


def _qwen2() -> PreTrainedModel:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED, **QUIET))


def _qwen3() -> PreTrainedModel:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, **QUIET, head_dim=16))  # 4 heads * 16 = 64, not the width


def _gemma2() -> PreTrainedModel:
    sizes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, **QUIET, **sizes))


def _gemma3_text_config() -> dict[str, Any]:
    sizes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    return {**GROUPED, **QUIET, **sizes, "layer_types": ["sliding_attention", "full_attention"] * (BLOCKS // 2)}


def _gemma3_text() -> PreTrainedModel:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_gemma3_text_config()))


def _gemma3_vlm() -> PreTrainedModel:
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,  # as deep as the text part: depth alone does not tell the two apart
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    ids = {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302, "mm_tokens_per_image": 4}
    config = tf.Gemma3Config(text_config=_gemma3_text_config(), vision_config=vision, **ids, **QUIET)
    return tf.Gemma3ForConditionalGeneration(config)


def _phi3() -> PreTrainedModel:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED, **QUIET))


def _gpt2() -> PreTrainedModel:
    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=BLOCKS,
        n_head=4,
        n_positions=MAX_POSITIONS,
        initializer_range=0.2,
        **QUIET,
    )
    return tf.GPT2LMHeadModel(config)


def _gpt_neox() -> PreTrainedModel:
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES, **HEADS, **QUIET, intermediate_size=48))


def _opt_config(**more: Any) -> Any:
    return tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=MAX_POSITIONS,
        init_std=0.2,
        **QUIET,
        **more,
    )


def _opt() -> PreTrainedModel:
    return tf.OPTForCausalLM(_opt_config(word_embed_proj_dim=HIDDEN))


def _opt_post() -> PreTrainedModel:
    return tf.OPTForCausalLM(_opt_config(word_embed_proj_dim=16, do_layer_norm_before=False))


def _falcon_config(**more: Any) -> Any:
    return tf.FalconConfig(**SIZES, **HEADS, **QUIET, ffn_hidden_size=48, bias=False, **more)


def _falcon() -> PreTrainedModel:
    return tf.FalconForCausalLM(_falcon_config(multi_query=True, parallel_attn=True, new_decoder_architecture=False))


def _falcon_new() -> PreTrainedModel:
    return tf.FalconForCausalLM(_falcon_config(num_kv_heads=2, new_decoder_architecture=True))


def _bloom() -> PreTrainedModel:
    return tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=BLOCKS, n_head=4, initializer_range=0.2, **QUIET)
    )


def _mixtral() -> PreTrainedModel:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(**GROUPED, **QUIET, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    )


def _qwen3_moe() -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GROUPED, **QUIET, **experts, head_dim=8))


def _gpt_oss() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}  # the default stretches far beyond 256 positions
    sizes = {"head_dim": 8, "sliding_window": 8, "rope_parameters": rope}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**GROUPED, **QUIET, **experts, **sizes))


def _qwen3_next() -> PreTrainedModel:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": True,
    }
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    }
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**GROUPED, **QUIET, **experts, **linear, head_dim=8))


def _mamba() -> PreTrainedModel:
    return tf.MambaForCausalLM(tf.MambaConfig(**SIZES, **QUIET, state_size=8))


def _olmo2() -> PreTrainedModel:
    return tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED, **QUIET))


def _cohere() -> PreTrainedModel:
    return tf.CohereForCausalLM(tf.CohereConfig(**GROUPED, **QUIET, logit_scale=1.0))


def _llama_peft() -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # peft 0.21 asks for an attribute that transformers 5 renames.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        model = get_peft_model(_llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # B starts at zero: the adapter would do nothing
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "gemma3_vlm": _gemma3_vlm,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "opt_post": _opt_post,
    "falcon": _falcon,
    "falcon_new": _falcon_new,
    "bloom": _bloom,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "qwen3_next": _qwen3_next,
    "mamba": _mamba,
    "olmo2": _olmo2,
    "cohere": _cohere,
    "llama_peft": _llama_peft,
}


# ---------------------------------------------------------------------------------------------------------------------
# Further families, chosen to differ in form. Tests take a covering choice of them, all cells under slow.

LINEAR, FULL, SLIDING, HYBRID = "linear_attention", "full_attention", "sliding_attention", "hybrid"
ALTERNATING = {"layer_types": [LINEAR, FULL, LINEAR, FULL]}
WINDOWS = {"layer_types": [SLIDING, FULL, SLIDING, FULL], "sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SPACE = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
SPACES = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SCALED = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.5, "logits_scaling": 0.5}
GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": MAX_POSITIONS}
DEPTH = {"n_layers": BLOCKS, "n_heads": 4, "d_model": HIDDEN, "max_seq_len": MAX_POSITIONS}
NEEDED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ALL_HEADS = {**GROUPED, "num_key_value_heads": 4}

# What the classes of a family are called in transformers, and what its config is given beside `QUIET`.
FURTHER_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # Halves side by side, one norm for both or one each.
    "gptj": ("GPTJ", {**GPT, "initializer_range": 0.2, "rotary_dim": 4}),
    "codegen": ("CodeGen", {**GPT, "initializer_range": 0.2, "rotary_dim": 4}),
    "phi": ("Phi", ALL_HEADS),
    "stablelm": ("StableLm", {**GROUPED, "use_parallel_residual": True}),
    "cohere2": ("Cohere2", {**GROUPED, **WINDOWS, "head_dim": 8, "logit_scale": 1.0}),
    # Attention and positions of their own: one key head, local windows, ALiBi, some blocks without positions, latents.
    "gpt_bigcode": ("GPTBigCode", {**GPT, "initializer_range": 0.2}),
    "gpt_neo": (
        "GPTNeo",
        {
            **SIZES,
            "num_heads": 4,
            "num_layers": BLOCKS,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
        },
    ),
    "mpt": ("Mpt", {**DEPTH, "vocab_size": VOCAB, "initializer_range": 0.2, "expansion_ratio": 2, "use_cache": True}),
    "starcoder2": ("Starcoder2", {**GROUPED, "sliding_window": 8}),
    "persimmon": ("Persimmon", {**SIZES, **HEADS, "intermediate_size": 48}),
    "biogpt": ("BioGpt", {**SIZES, **HEADS, "intermediate_size": 48}),
    "xglm": (
        "XGLM",
        {
            "d_model": HIDDEN,
            "ffn_dim": 48,
            "num_layers": BLOCKS,
            "attention_heads": 4,
            "init_std": 0.2,
            "vocab_size": VOCAB,
        },
    ),
    "diffllama": ("DiffLlama", GROUPED),
    "smollm3": ("SmolLM3", {**GROUPED, "no_rope_layers": [1, 0, 1, 0]}),
    "seed_oss": ("SeedOss", {**GROUPED, "head_dim": 16}),
    "nemotron": ("Nemotron", {**GROUPED, "head_dim": 8}),
    "helium": ("Helium", {**GROUPED, "head_dim": 8}),
    "apertus": ("Apertus", GROUPED),
    "nanochat": ("NanoChat", GROUPED),
    "modernbert_decoder": (
        "ModernBertDecoder",
        {**SIZES, **HEADS, "intermediate_size": 48, "local_attention": 8, **NEEDED},
    ),
    # Norms after the halves, before them and after, or on the stream.
    "glm4": ("Glm4", {**GROUPED, "head_dim": 8}),
    "exaone4": ("Exaone4", {**GROUPED, **WINDOWS}),
    "vaultgemma": ("VaultGemma", {**GROUPED, **WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "openai_gpt": ("OpenAIGPT", {**GPT, "initializer_range": 0.2}),
    # What a half adds is multiplied; inputs of each block's own; blocks that share keys and values.
    "granite": ("Granite", {**GROUPED, **SCALED}),
    "minicpm3": ("MiniCPM3", {**ALL_HEADS, **LATENT}),
    "gemma4_text": (
        "Gemma4",
        {**GROUPED, **WINDOWS, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    ),
    "gemma4_kv_shared": (  # the last block reads the keys and values of one before it
        "Gemma4",
        {
            **GROUPED,
            **WINDOWS,
            "head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 1,
        },
    ),
    # State spaces, convolutions and linear attention, alone and between blocks of attention.
    "mamba2": ("Mamba2", {**SIZES, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 4}),
    "falcon_mamba": ("FalconMamba", {**SIZES, "state_size": 8}),
    "jamba": (
        "Jamba",
        {
            **GROUPED,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": ("Bamba", {**GROUPED, **SPACE, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("FalconH1", {**GROUPED, **SPACE, "mamba_d_ssm": 64, "ssm_out_multiplier": 0.5}),
    "nemotron_h": (
        "NemotronH",
        {
            **{name: size for name, size in GROUPED.items() if name != "num_hidden_layers"},
            **SPACES,
            "layers_block_type": [LINEAR, "mlp", FULL, "mlp"],
            **{"head_dim": 8, "initializer_range": 0.1, "chunk_size": 8},
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {**GROUPED, **SPACE, **ALTERNATING, **SCALED, "num_local_experts": 4, "shared_intermediate_size": 24},
    ),
    "zamba2": (
        "Zamba2",
        {
            **ALL_HEADS,
            **{"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 4, "adapter_rank": 8},
            **{"layers_block_type": [LINEAR, HYBRID] * 2, "initializer_range": 0.1},
        },
    ),
    "lfm2": ("Lfm2", {**GROUPED, "layer_types": ["conv", FULL, "conv", FULL]}),
    "minimax": (
        "MiniMax",
        {**GROUPED, "layer_types": [FULL, LINEAR] * 2, "num_local_experts": 4, "block_size": 4},
    ),
    "olmo_hybrid": ("OlmoHybrid", {**ALL_HEADS, **ALTERNATING, **DELTA, "linear_num_key_heads": 4}),
    "qwen3_5": ("Qwen3_5", {**GROUPED, **ALTERNATING, **DELTA, "head_dim": 8}),
    "kimi_linear": (
        "KimiLinear",
        {
            **{**ALL_HEADS, **LATENT, **ALTERNATING, **EXPERTS, "num_experts": 4, "num_experts_per_token": 2},
            **{"linear_head_dim": 8, "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
        },
    ),
    # Experts chosen by a sigmoid, or of another kind.
    "deepseek_v3": ("DeepseekV3", {**ALL_HEADS, **LATENT, **ROUTED, "first_k_dense_replace": 1}),
    "glm4_moe": ("Glm4Moe", {**GROUPED, **ROUTED, "head_dim": 8, "first_k_dense_replace": 1}),
    "dots1": ("Dots1", {**GROUPED, **ROUTED, "first_k_dense_replace": 1}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {**GROUPED, "moe_intermediate_size": 24, "moe_k": 2, "moe_num_experts": 4}),
    "llama4_text": (
        "Llama4",
        {**GROUPED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "attention_chunk_size": 64},
    ),
    "jetmoe": ("JetMoe", {**SIZES, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 24}),
    "olmoe": ("Olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
}


def _further(name: str) -> PreTrainedModel:
    classes, given = FURTHER_CONFIGS[name]
    model = getattr(tf, f"{classes}ForCausalLM", None) or getattr(tf, f"{classes}LMHeadModel")
    config = getattr(tf, f"{classes}TextConfig", None) or getattr(tf, f"{classes}Config")
    return model(config(**QUIET | given))


FURTHER: dict[str, Callable[[], PreTrainedModel]] = {
    name: functools.partial(_further, name) for name in FURTHER_CONFIGS
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A fresh model of one family in evaluation mode, float32, with the same weights every time.

    Norm weights and biases start at one and zero, where they would hide mistakes; here they are moved off.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (FAMILIES | FURTHER | FORMS)[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def shortened(model: Any, blocks: int) -> Any:
    """A Llama with its first blocks only."""
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Other forms: several residual streams, a cache by another name, depths that count cache slots. Outside of FAMILIES,
# whose tests ask for one stream [b, t, d], keys and values in `past_key_values` and `BLOCKS` blocks.

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}


def _deepseek_v4() -> PreTrainedModel:
    sizes = {**SIZES, **HEADS, **EXPERTS, **INDEXER, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8}
    config = tf.DeepseekV4Config(**sizes, **QUIET, partial_rotary_factor=0.5, sliding_window=8)
    return tf.DeepseekV4ForCausalLM(config)


def _hy_v4() -> PreTrainedModel:
    sizes = {**SIZES, **HEADS, **EXPERTS, **LATENT, **INDEXER, "intermediate_size": 48}
    return tf.HYV4ForCausalLM(tf.HYV4Config(**sizes, **QUIET))


def _qwen4_exp() -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    sizes = {**SIZES, **HEADS, **experts, **linear, "linear_value_head_dim": 8, "num_key_value_heads": 2, "head_dim": 8}
    more = {"shared_expert_intermediate_size": 24, "hc_lowrank": 8, "full_attention_interval": 2}
    indexer = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
    config = tf.Qwen4ExpTextConfig(**sizes, **QUIET, **more, **indexer, indexer_compress_ratio=2)
    return tf.Qwen4ExpForCausalLM(config)


def _gemma3n() -> PreTrainedModel:
    streams = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4}
    sizes = {
        "head_dim": 8,
        "sliding_window": 8,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * BLOCKS,
    }
    return tf.Gemma3nForCausalLM(tf.Gemma3nTextConfig(**GROUPED, **QUIET, **sizes, **streams))


def _rwkv() -> PreTrainedModel:
    return tf.RwkvForCausalLM(tf.RwkvConfig(**{**SIZES, "intermediate_size": 48}, **QUIET))


def _longcat_flash() -> PreTrainedModel:
    experts = {"n_routed_experts": 4, "moe_topk": 2, "expert_ffn_hidden_size": 24, "zero_expert_num": 2}
    sizes = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
    heads = {**HEADS, **LATENT, "head_dim": 8, "num_layers": BLOCKS, "ffn_hidden_size": 48}
    return tf.LongcatFlashForCausalLM(tf.LongcatFlashConfig(**sizes, **heads, **experts, **QUIET))


def _hrm_text() -> PreTrainedModel:
    sizes = {**SIZES, **HEADS, "intermediate_size": 48, "head_dim": 8, "H_cycles": 1, "L_cycles": 2}
    return tf.HrmTextForCausalLM(tf.HrmTextConfig(**sizes, **QUIET))


FORMS: dict[str, Callable[[], PreTrainedModel]] = {
    "deepseek_v4": _deepseek_v4,
    "hy_v4": _hy_v4,
    "qwen4_exp": _qwen4_exp,
    "gemma3n": _gemma3n,
    "rwkv": _rwkv,
    "longcat_flash": _longcat_flash,
    "hrm_text": _hrm_text,
}
