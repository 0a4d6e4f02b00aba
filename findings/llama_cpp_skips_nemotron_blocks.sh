#!/usr/bin/env bash
# llama.cpp b11549 (xllamacpp 2026.10.11549), gguf 0.19.0.
# Expected: a control vector for block N is added to the output of block N, in every block from 1 on; a family that has
#   no control vectors would say so.
# Seen: in Nemotron-H, whose blocks are Mamba, attention or MLP, it is added behind MLP blocks only. For the others the
#   call succeeds and the logits are bitwise those without a vector.
# Output seen (largest change of a logit by a vector at one block):
#   block 1, mlp: 0.75
#   block 2, attention: 0
#   block 3, mamba: 0
#   block 4, mlp: 0.55
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

KINDS = ("mamba", "mlp", "attention", "mamba", "mlp")
BLOCKS, WIDTH, INNER, STATE, HEADS, VOCABULARY = len(KINDS), 32, 32, 16, 4, 64
draw = numpy.random.default_rng(0)


def weights(*shape):
    return draw.normal(0, 0.3, shape).astype(numpy.float32)


def ones(*shape):
    return numpy.ones(shape, dtype=numpy.float32)


writer = gguf.GGUFWriter("model.gguf", "nemotron_h")
writer.add_context_length(64)
writer.add_embedding_length(WIDTH)
writer.add_block_count(BLOCKS)
writer.add_feed_forward_length([48 if kind == "mlp" else 0 for kind in KINDS])
writer.add_head_count(4)
writer.add_head_count_kv([2 if kind == "attention" else 0 for kind in KINDS])
writer.add_key_length(8)
writer.add_value_length(8)
writer.add_layer_norm_eps(1e-5)
writer.add_rope_dimension_count(8)
writer.add_ssm_conv_kernel(4)
writer.add_ssm_inner_size(INNER)
writer.add_ssm_state_size(STATE)
writer.add_ssm_time_step_rank(HEADS)
writer.add_ssm_group_count(1)
writer.add_vocab_size(VOCABULARY)
writer.add_tokenizer_model("no_vocab")
mixed = INNER + 2 * STATE
parts = {
    "mamba": {
        "ssm_in.weight": (INNER + mixed + HEADS, WIDTH),
        "ssm_conv1d.weight": (mixed, 4),
        "ssm_conv1d.bias": (mixed,),
        "ssm_dt.bias": (HEADS,),
        "ssm_d": (HEADS, 1),
        "ssm_out.weight": (WIDTH, INNER),
    },
    "attention": {
        "attn_q.weight": (32, WIDTH),
        "attn_k.weight": (16, WIDTH),
        "attn_v.weight": (16, WIDTH),
        "attn_output.weight": (WIDTH, 32),
    },
    "mlp": {"ffn_up.weight": (48, WIDTH), "ffn_down.weight": (WIDTH, 48)},
}
tensors = {"token_embd.weight": weights(VOCABULARY, WIDTH), "output.weight": weights(VOCABULARY, WIDTH)}
tensors["output_norm.weight"] = ones(WIDTH)
for block, kind in enumerate(KINDS):
    tensors[f"blk.{block}.attn_norm.weight"] = ones(WIDTH)
    tensors |= {f"blk.{block}.{name}": weights(*shape) for name, shape in parts[kind].items()}
    if kind == "mamba":
        tensors |= {f"blk.{block}.ssm_a": -ones(HEADS, 1), f"blk.{block}.ssm_norm.weight": ones(1, INNER)}
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


context = started()
plain, changes = logits(context), {}
for block in range(1, BLOCKS):
    rows = numpy.zeros((BLOCKS - 1, WIDTH), dtype=numpy.float32)
    rows[block - 1] = 1.0
    steer(context, rows)
    changes[block] = float(abs(logits(context) - plain).max())
    print(f"block {block}, {KINDS[block]}: {changes[block]:.2g}")
steered = [block for block, change in changes.items() if change > 0.01]
assert steered == [1, 4] and changes[2] == changes[3] == 0.0, "the behaviour has changed"
PYTHON
