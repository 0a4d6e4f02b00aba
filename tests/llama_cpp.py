"""llama.cpp itself, compiled: tiny models in its format, and its logits with a control vector or a LoRA adapter.

`xllamacpp` brings a library that exports the C interface, `llama-cpp-py-sync` the declarations of that same build
(b11549). `pip install --no-deps xllamacpp==2026.10.11549 llama-cpp-py-sync==0.11548` and `pip install cffi`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from torch import Tensor

F32, NO_FLASH_ATTENTION = 0, 0


def library() -> tuple[Any, Any]:
    """The library and its foreign function interface."""
    wanted = ("xllamacpp", "llama_cpp_py_sync", "cffi")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; the extra `engines` says which versions")
    from llama_cpp_py_sync._cffi_bindings import ffi

    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    loaded = ffi.dlopen(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    return loaded, ffi


class Engine:
    """One model in llama.cpp, in full precision: its weights, its cache and its sums."""

    def __init__(self, model: Path) -> None:
        self.lib, self.ffi = library()
        self.quiet = self.ffi.callback("ggml_log_callback", lambda *_: None)
        self.lib.llama_log_set(self.quiet, self.ffi.NULL)
        self.lib.llama_backend_init()
        wanted = self.lib.llama_model_default_params()
        wanted.n_gpu_layers, wanted.use_extra_bufts = 0, False
        self.model = self.lib.llama_model_load_from_file(str(model).encode(), wanted)
        assert self.model != self.ffi.NULL, "llama.cpp does not load this model"

    @contextmanager
    def context(self) -> Iterator[Any]:
        how = self.lib.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = 128
        how.n_threads = how.n_threads_batch = 1
        how.type_k = how.type_v = F32
        how.flash_attn_type = NO_FLASH_ATTENTION
        made = self.lib.llama_init_from_model(self.model, how)
        assert made != self.ffi.NULL
        try:
            yield made
        finally:
            self.lib.llama_free(made)

    def logits(self, ids: Tensor, *, vector: Path | None = None, shift: int = 0, lora: Path | None = None) -> Tensor:
        """Logits [t, vocabulary] of one row, float32.

        Args:
            ids: [t].
            vector: a control vector file, placed as llama.cpp's own loader does.
            shift: how many blocks later it is put than it says, to be wrong on purpose.
            lora: an adapter.
        """
        tokens = [int(one) for one in ids]
        vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        with self.context() as context:
            if vector is not None:
                self._set_vector(context, vector, shift)
            if lora is not None:
                adapter = self.lib.llama_adapter_lora_init(self.model, str(lora).encode())
                assert adapter != self.ffi.NULL, "llama.cpp does not load this adapter"
                given = self.ffi.new("struct llama_adapter_lora *[]", [adapter])
                assert self.lib.llama_set_adapters_lora(context, given, 1, self.ffi.new("float[]", [1.0])) == 0
            batch = self.lib.llama_batch_init(len(tokens), 0, 1)
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
                batch.seq_id[place][0], batch.logits[place] = 0, 1
            assert self.lib.llama_decode(context, batch) == 0
            size = 4 * vocabulary * len(tokens)
            found = bytearray(self.ffi.buffer(self.lib.llama_get_logits(context), size))
            self.lib.llama_batch_free(batch)
        return torch.frombuffer(found, dtype=torch.float32).reshape(len(tokens), vocabulary)

    def _set_vector(self, context: Any, path: Path, shift: int) -> None:
        width, depth = self.lib.llama_model_n_embd(self.model), self.lib.llama_model_n_layer(self.model)
        # common_control_vector_load puts direction.N at row N - 1; rows that are not given would keep older values.
        rows = numpy.zeros((depth - 1, width), dtype=numpy.float32)
        for tensor in gguf.GGUFReader(path).tensors:
            rows[int(tensor.name.removeprefix("direction.")) - 1 + shift] = tensor.data
        data = self.ffi.from_buffer("float[]", rows)
        assert self.lib.llama_set_adapter_cvec(context, data, rows.size, width, 1, depth) == 0


def kl(expected: Tensor, found: Tensor) -> float:
    """The largest KL divergence of any token, in nats; expected and found are logits [t, vocabulary]."""
    one, other = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).max())


# What each tensor of a block is called in GGUF and in transformers.
_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix in the order of llama.cpp's Llama, whose rotary pairs stand side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def as_gguf_model(model: Any, path: Path, architecture: str) -> Path:
    """Write a Llama, Mistral, Qwen2 or Qwen3 of transformers as llama.cpp has it, float32 and without a tokenizer."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    found: Mapping[str, Tensor] = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        **({} if config.tie_word_embeddings else {"output.weight": state["lm_head.weight"]}),
        **{
            f"blk.{block}.{name}": state[f"model.layers.{block}.{theirs}"]
            for block in range(config.num_hidden_layers)
            for name, theirs in _NAMES.items()
            if f"model.layers.{block}.{theirs}" in state
        },
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in found.items():
        short = name.split(".")[-2]
        turned = paired(tensor, heads[short]) if architecture == "llama" and short in heads else tensor
        writer.add_tensor(name, turned.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
