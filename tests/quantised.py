"""Tiny models as the libraries quantise them, on a CPU: in place, or by a config where transformers knows one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from tests.families import HEADS, QUIET, SIZES

WIDTH = 64  # bitsandbytes packs four bits in groups of 64


def llama(*, bias: bool = True) -> Any:
    """A llama with a bias in every layer, so that additions have a place."""
    sizes = {**SIZES, **HEADS, "hidden_size": WIDTH, "num_key_value_heads": 2, "intermediate_size": 2 * WIDTH}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **QUIET, mlp_bias=bias)).eval()


def _linears(model: Any) -> list[tuple[str, nn.Linear]]:
    return [(name, one) for name, one in model.named_modules() if type(one) is nn.Linear and name != "lm_head"]


def _bnb(bits: int, model: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    for name, old in _linears(model):
        sizes = old.in_features, old.out_features, old.bias is not None
        if bits == 4:
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        model.set_submodule(name, new.to("cpu").eval())
    return _one_kernel(model)


def _one_kernel(model: Any) -> Any:
    """Without the packing for AVX-512: in bitsandbytes 0.50.2 every `state_dict()` undoes and repeats it, with loss."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _torchao(model: Any) -> Any:
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    return model


def _quanto(model: Any, *, frozen: bool = True) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    if frozen:
        quanto.freeze(model)
    return model


def _dynamic(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "bnb4": lambda model: _bnb(4, model),
    "bnb8": lambda model: _bnb(8, model),
    "torchao": _torchao,
    "quanto": _quanto,
    "quanto_unfrozen": lambda model: _quanto(model, frozen=False),
    "dynamic": _dynamic,
}


def _torchao_config() -> Any:
    ao = pytest.importorskip("torchao.quantization")
    return tf.TorchAoConfig(ao.Int8WeightOnlyConfig())


BY_CONFIG: dict[str, tuple[str, Callable[[], Any]]] = {
    "bnb4_config": (
        "bitsandbytes",
        lambda: tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    ),
    "bnb8_config": ("bitsandbytes", lambda: tf.BitsAndBytesConfig(load_in_8bit=True)),
    "torchao_config": ("torchao", _torchao_config),
    "quanto_config": ("optimum.quanto", lambda: tf.QuantoConfig(weights="int8")),
}

KINDS = (*IN_PLACE, *BY_CONFIG)


def quantised(kind: str, folder: Path) -> Any:
    """A model of one kind; skips where its library is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every layer that it computes in float16
    if kind in IN_PLACE:
        return IN_PLACE[kind](llama())
    library, config = BY_CONFIG[kind]
    pytest.importorskip(library)
    llama().save_pretrained(folder / "plain")
    return _one_kernel(tf.AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config())).eval()
