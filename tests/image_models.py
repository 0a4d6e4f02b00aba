"""Small random models that see images or hear sounds, and what they are given beside the ids of a text.

Their towers are as deep as their text part, so that a list of blocks is not told by its length alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.families import BLOCKS, GROUPED, HIDDEN, QUIET, VOCAB, build

IMAGE, START, END = 300, 301, 302  # beyond the tokenizer's ids
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOWER: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": BLOCKS}
TOWER |= {"num_attention_heads": 4}
VISION: dict[str, Any] = {**TOWER, "image_size": 16, "patch_size": 4}
QWEN_VISION = {"depth": BLOCKS, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
TAGS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}

Given = Callable[[int, Tensor], dict[str, Tensor]]


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _pixels(batch: int, _ids: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": _drawn(batch, 3, 16, 16)}


def _several(batch: int, _ids: Tensor) -> dict[str, Tensor]:
    """A list of images for each row."""
    return {"pixel_values": _drawn(batch, 1, 3, 16, 16)}


def _patches(batch: int, ids: Tensor) -> dict[str, Tensor]:
    """Qwen's processor lays the patches of all images out in one list of rows: two frames, three colours."""
    grid = torch.tensor([[1, 4, 4]] * batch)
    kinds = (ids == IMAGE).long()
    return {"pixel_values": _drawn(16 * batch, 2 * 3 * 4 * 4), "image_grid_thw": grid, "mm_token_type_ids": kinds}


def _gemma3_given(batch: int, ids: Tensor) -> dict[str, Tensor]:
    return {**_pixels(batch, ids), "token_type_ids": (ids == IMAGE).long()}


def _gemma4_given(batch: int, ids: Tensor) -> dict[str, Tensor]:
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), dim=-1).reshape(1, 16, 2)
    given = {"pixel_values": _drawn(batch, 16, 48), "image_position_ids": places.expand(batch, -1, -1)}
    return {**given, "mm_token_type_ids": (ids == IMAGE).long()}


def _kosmos2_given(batch: int, ids: Tensor) -> dict[str, Tensor]:
    return {**_pixels(batch, ids), "image_embeds_position_mask": (ids == IMAGE).long()}


def _mllama_given(batch: int, ids: Tensor) -> dict[str, Tensor]:
    """One image of one tile, which every token of the text sees."""
    ratio = {"aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long)}
    ratio["aspect_ratio_mask"] = torch.ones(batch, 1, 1, dtype=torch.long)
    across = torch.ones(batch, ids.shape[1], 1, 1, dtype=torch.long)
    return {"pixel_values": _drawn(batch, 1, 1, 3, 16, 16), "cross_attention_mask": across, **ratio}


def _heard(batch: int, _ids: Tensor) -> dict[str, Tensor]:
    return {"input_features": _drawn(batch, 8, 32), "feature_attention_mask": torch.ones(batch, 32, dtype=torch.long)}


def _llava() -> Any:
    text, vision = tf.LlamaConfig(**GROUPED, **QUIET), tf.CLIPVisionConfig(**VISION)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


def _qwen2_vl() -> Any:
    text = {**GROUPED, **QUIET, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision, **TAGS))


def _qwen2_5_vl() -> Any:
    text = {**GROUPED, **QUIET, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
    vision = {**QWEN_VISION, "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1], "window_size": 16}
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TAGS))


def _qwen3_vl() -> Any:
    """What its tower sees is added to the stream behind the first blocks too."""
    text = {**GROUPED, **QUIET, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
    vision = {**QWEN_VISION, "out_hidden_size": HIDDEN, "num_position_embeddings": 16}
    vision |= {"deepstack_visual_indexes": [0, 1]}
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(text_config=text, vision_config=vision, **TAGS))


def _glm4v() -> Any:
    rope = {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    vision = {**QWEN_VISION, "out_hidden_size": HIDDEN, "image_size": 16}
    tags = {"image_token_id": IMAGE, "image_start_token_id": START, "image_end_token_id": END}
    text = {**GROUPED, **QUIET, "rope_parameters": rope}
    return tf.Glm4vForConditionalGeneration(tf.Glm4vConfig(text_config=text, vision_config=vision, **tags))


def _smolvlm() -> Any:
    text = tf.LlamaConfig(**GROUPED, **QUIET)
    config = tf.SmolVLMConfig(text_config=text, vision_config=VISION, image_token_id=IMAGE, scale_factor=2)
    return tf.SmolVLMForConditionalGeneration(config)


def _idefics2() -> Any:
    resampler = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "num_key_value_heads": 2}
    resampler |= {"resampler_head_dim": 8, "hidden_size": HIDDEN}
    text, tag = tf.MistralConfig(**GROUPED, **QUIET), {"image_token_id": IMAGE}
    config = tf.Idefics2Config(text_config=text, vision_config=VISION, perceiver_config=resampler, **tag)
    return tf.Idefics2ForConditionalGeneration(config)


def _internvl() -> Any:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    text, tag = tf.Qwen2Config(**GROUPED, **QUIET), {"image_token_id": IMAGE}
    config = tf.InternVLConfig(vision_config=vision, text_config=text, downsample_ratio=0.5, **tag)
    return tf.InternVLForConditionalGeneration(config)


def _llama4() -> Any:
    text = {**GROUPED, **QUIET, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    text |= {"attention_chunk_size": 16}
    vision = {**VISION, "intermediate_size": 4 * HIDDEN, "vision_output_dim": HIDDEN}
    vision |= {"projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN}
    config = tf.Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return tf.Llama4ForConditionalGeneration(config)


def _gemma4() -> Any:
    text = {**GROUPED, **SPECIAL, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
    text |= {"vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    vision = {**VISION, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 16}
    vision |= {"num_key_value_heads": 4}
    tags = {"image_token_id": IMAGE, "boi_token_id": START, "eoi_token_id": END}
    config = tf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tags)
    return tf.Gemma4ForConditionalGeneration(config)


def _mllama() -> Any:
    """Some of its blocks attend to the image and to nothing else."""
    text = {**GROUPED, **SPECIAL, "cross_attention_layers": [1, 3], "rope_parameters": ROPE}
    vision = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_global_layers": 1, "attention_heads": 4}
    vision |= {"intermediate_size": 48, "vision_output_dim": 2 * HIDDEN, "image_size": 16, "patch_size": 4}
    vision |= {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]}
    config = tf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return tf.MllamaForConditionalGeneration(config)


def _blip2() -> Any:
    """Calls `generate` of the language model inside it, with embeddings and ids."""
    text = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=HIDDEN,
        **{**SPECIAL, "eos_token_id": None},
    )
    former = {**TOWER, "vocab_size": VOCAB, "encoder_hidden_size": HIDDEN}
    sizes = {"num_query_tokens": 4, "image_token_index": IMAGE}
    config = tf.Blip2Config(vision_config=VISION, qformer_config=former, text_config=text, **sizes)
    return tf.Blip2ForConditionalGeneration(config)


def _kosmos2() -> Any:
    """Calls `generate` of the language model inside it, whose forward cannot be told how many logits are wanted."""
    text = {"vocab_size": VOCAB, "max_position_embeddings": 256, "embed_dim": HIDDEN, "layers": BLOCKS, "ffn_dim": 48}
    text |= {"attention_heads": 4, "pad_token_id": 0}
    config = tf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=4)
    return tf.Kosmos2ForConditionalGeneration(config)


def _qwen2_audio() -> Any:
    sound = {"d_model": HIDDEN, "encoder_layers": BLOCKS, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    sound |= {"num_mel_bins": 8, "max_source_positions": 16}
    text = tf.Qwen2Config(**GROUPED, **QUIET)
    config = tf.Qwen2AudioConfig(audio_config=sound, text_config=text, audio_token_index=IMAGE)
    return tf.Qwen2AudioForConditionalGeneration(config)


def phi4_multimodal() -> Any:
    """Three lists of as many modules: blocks, and the layers of two towers inside its embedding."""
    rope = {**ROPE, "partial_rotary_factor": 1.0}
    sound = {**TOWER, "ext_pw_out_channel": HIDDEN, "nemo_conv_channels": 8, "input_size": 8}
    sound["num_blocks"] = sound.pop("num_hidden_layers")
    towers = {"vision_config": {**VISION, "crop_size": 16}, "audio_config": sound}
    config = tf.Phi4MultimodalConfig(**GROUPED, **SPECIAL, rope_parameters=rope, **towers)
    return tf.Phi4MultimodalForCausalLM(config)


@dataclass(frozen=True)
class Seeing:
    """How a model is made, which tokens stand for one image or sound, and what it is given beside the ids."""

    build: Callable[[], Any]
    tokens: list[int]
    given: Given = _pixels


FRAMED = [START, *[IMAGE] * 4, END]
SEEING: dict[str, Seeing] = {
    "llava": Seeing(_llava, [IMAGE] * 16),
    "qwen2_5_vl": Seeing(_qwen2_5_vl, FRAMED, _patches),
    "gemma3": Seeing(lambda: build("gemma3_vlm"), FRAMED, _gemma3_given),
    "smolvlm": Seeing(_smolvlm, [IMAGE] * 4, _several),
    "qwen3_vl": Seeing(_qwen3_vl, FRAMED, _patches),
    "blip2": Seeing(_blip2, [IMAGE] * 4),
    "kosmos2": Seeing(_kosmos2, [IMAGE] * 4, _kosmos2_given),
    "mllama": Seeing(_mllama, [IMAGE], _mllama_given),
}
FURTHER_SEEING: dict[str, Seeing] = {
    "qwen2_vl": Seeing(_qwen2_vl, FRAMED, _patches),
    "glm4v": Seeing(_glm4v, FRAMED, _patches),
    "idefics2": Seeing(_idefics2, [IMAGE] * 4, _several),
    "internvl": Seeing(_internvl, [IMAGE] * 4),
    "llama4": Seeing(_llama4, [IMAGE] * 4),
    "gemma4": Seeing(_gemma4, FRAMED, _gemma4_given),
    "qwen2_audio": Seeing(_qwen2_audio, [IMAGE] * 8, _heard),
}
