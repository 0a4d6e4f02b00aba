#!/usr/bin/env bash
# llama.cpp b11549 (xllamacpp 2026.10.11549), gguf 0.19.0.
# Expected: `llama_set_adapter_cvec` replaces the control vector of a context by the one it is given. What its own loader
#   (`common_control_vector_load`) gives has rows up to the last block that a file names, and their number goes with them.
# Seen: blocks behind the last row that is given keep the rows of the vector before. A context that had a vector of three
#   blocks and gets one of the first block is steered at all three. Passing NULL in between does not help, because it
#   switches the vector off without clearing it; rows of zeros for every later block do.
# Output seen (largest difference of a logit from a fresh context with the second vector alone):
#   second vector after the first: 1.3
#   with NULL in between: 1.3
#   padded with zeros: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps xllamacpp==2026.10.11549 llama-cpp-py-sync==0.11548
"$folder/venv/bin/pip" install --quiet cffi==2.1.1 gguf==0.19.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import gguf
import numpy
import xllamacpp
from llama_cpp_py_sync._cffi_bindings import ffi

BLOCKS, WIDTH, VOCABULARY = 4, 32, 64
draw = numpy.random.default_rng(0)


def weights(*shape):
    return draw.normal(0, 0.3, shape).astype(numpy.float32)


writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_block_count(BLOCKS)
writer.add_feed_forward_length(48)
writer.add_head_count(4)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(8)
writer.add_vocab_size(VOCABULARY)
writer.add_tokenizer_model("no_vocab")
parts = {
    "attn_q.weight": (32, WIDTH),
    "attn_k.weight": (16, WIDTH),
    "attn_v.weight": (16, WIDTH),
    "attn_output.weight": (WIDTH, 32),
    "ffn_gate.weight": (48, WIDTH),
    "ffn_up.weight": (48, WIDTH),
    "ffn_down.weight": (WIDTH, 48),
}
one = numpy.ones(WIDTH, dtype=numpy.float32)
tensors = {"token_embd.weight": weights(VOCABULARY, WIDTH), "output.weight": weights(VOCABULARY, WIDTH)}
tensors["output_norm.weight"] = one
for block in range(BLOCKS):
    tensors |= {f"blk.{block}.attn_norm.weight": one, f"blk.{block}.ffn_norm.weight": one}
    tensors |= {f"blk.{block}.{name}": weights(*shape) for name, shape in parts.items()}
for name, value in tensors.items():
    writer.add_tensor(name, value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

lib = ffi.dlopen(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
quiet = ffi.callback("ggml_log_callback", lambda *_: None)
lib.llama_log_set(quiet, ffi.NULL)
how = lib.llama_model_default_params()
how.n_gpu_layers = 0
model = lib.llama_model_load_from_file(b"model.gguf", how)
assert model != ffi.NULL


def started():
    how = lib.llama_context_default_params()
    how.n_ctx, how.n_threads, how.n_threads_batch = 64, 1, 1
    return lib.llama_init_from_model(model, how)


def steer(context, rows):
    """Give a control vector: rows [blocks, width] from block 1 on."""
    data = ffi.from_buffer("float[]", rows)
    assert lib.llama_set_adapter_cvec(context, data, rows.size, WIDTH, 1, BLOCKS) == 0


def logits(context):
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    tokens = ffi.new("int32_t[]", [3, 7, 1, 9])
    assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, 4)) == 0
    found = bytes(ffi.buffer(lib.llama_get_logits_ith(context, -1), 4 * VOCABULARY))
    return numpy.frombuffer(found, dtype=numpy.float32)


first, second = numpy.ones((3, WIDTH), dtype=numpy.float32), weights(1, WIDTH)
padded = numpy.concatenate([second, numpy.zeros((2, WIDTH), dtype=numpy.float32)])


def difference(*, off_between=False, rows=second):
    context = started()
    steer(context, first)
    if off_between:
        assert lib.llama_set_adapter_cvec(context, ffi.NULL, 0, WIDTH, 1, BLOCKS) == 0
    steer(context, rows)
    return float(abs(logits(context) - alone).max())


context = started()
steer(context, second)
alone = logits(context)
found = difference(), difference(off_between=True), difference(rows=padded)
for name, value in zip(("second vector after the first", "with NULL in between", "padded with zeros"), found):
    print(f"{name}: {value:.2g}")
assert found[0] > 0.01 and found[1] > 0.01 and found[2] == 0.0, "the behaviour has changed"
PYTHON
