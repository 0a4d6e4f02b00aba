"""Where a model is put and in which form: device, precision, quantisation, attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from steerkit.errors import ModelError, near_miss

__all__ = [
    "DTYPES",
    "QUANTISED",
    "accelerator",
    "check_together",
    "describe",
    "devices",
    "for_checkpoint",
    "options_of",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTISED = ("4bit", "8bit")
_EXTRA = "pip install 'steerkit-hf[quantised]'"


def devices() -> list[str]:
    """The devices of this machine that a model can be put on, the accelerators first."""
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.xpu.is_available():
        found += [f"xpu:{number}" for number in range(torch.xpu.device_count())]
    return [*found, "cpu"]


def accelerator() -> str:
    """Where a model goes if nobody says: the first accelerator of this machine, else the CPU."""
    return devices()[0]


def check_together(*, device: Any, device_map: Any, dtype: torch.dtype | str | None, quantize: str | None) -> None:
    """Refuse options that do not go together or do not exist, whatever the machine.

    Args:
        device: the one device.
        device_map: how a model is spread over several.
        dtype: of the weights.
        quantize: how small the weights are made.

    Raises:
        ModelError: both a device and a map, or no such precision or quantisation.
    """
    if device is not None and device_map is not None:
        raise ModelError(
            f"device {str(device)!r} with device_map {device_map!r}: one device or a map over several; give one of them"
        )
    if quantize is not None and quantize not in QUANTISED:
        raise ModelError(f"quantize {quantize!r}: there are {' and '.join(QUANTISED)}")
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ModelError(f"dtype {dtype!r}: no such precision; {near_miss(dtype, DTYPES)}")


def options_of(
    *,
    device: torch.device | str | None,
    device_map: str | Mapping[str, Any] | None,
    dtype: torch.dtype | str | None,
    quantize: str | None,
    attn: str | None,
) -> dict[str, Any]:
    """What `from_pretrained` is told, checked against this machine before anything is read.

    Args:
        device: as for `load_model`.
        device_map: as for `load_model`.
        dtype: as for `load_model`.
        quantize: as for `load_model`.
        attn: as for `load_model`.

    Raises:
        ModelError: something does not exist, here or at all, or does not go together.
    """
    check_together(device=device, device_map=device_map, dtype=dtype, quantize=quantize)
    place = _device(device) if device_map is None else None
    options: dict[str, Any] = {}
    if dtype is not None:
        options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        if place is not None and dtype != "auto":
            _check_dtype(options["dtype"], place)
    if device_map is not None:
        options["device_map"] = device_map
    elif place != "cpu" or quantize:  # a map of one device: read straight to where it goes
        options["device_map"] = {"": place}
    if quantize is not None:
        options["quantization_config"] = _quantisation(quantize)
    if attn is not None:
        options["attn_implementation"] = _attention(attn)
    return options


def for_checkpoint(config: Any, source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that quantise, as they are for one checkpoint: what is packed is computed with in the weights' precision.

    Args:
        config: of the checkpoint.
        source: where it is, for the message.
        options: of `from_pretrained`.

    Raises:
        ModelError: it is quantised already.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{source}: is quantised already; leave quantize out, or give the model's plain weights")
    how, dtype = options["quantization_config"], options.get("dtype", "auto")
    if how.load_in_4bit:
        how.bnb_4bit_compute_dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    return dict(options)


def describe(model: nn.Module) -> str:
    """Where a model is and in which form, in a few words: ``on cuda:0, bfloat16, 4 bit``.

    Args:
        model: loaded.
    """
    spread = getattr(model, "hf_device_map", None) or {}
    places = [str(device) for device in dict.fromkeys(spread.values())] if len(set(spread.values())) > 1 else []
    on = [f"cuda:{place}" if place.isdigit() else place for place in places] or [str(next(model.parameters()).device)]
    config: Any = getattr(model, "config", None)
    words = [f"on {', '.join(on)}", str(getattr(model, "dtype", "")).removeprefix("torch.")]
    found = getattr(config, "quantization_config", None)
    if found is not None:
        plain = found if isinstance(found, dict) else found.to_dict()
        bits = 4 if plain.get("load_in_4bit") else 8 if plain.get("load_in_8bit") else plain.get("bits")
        words.append(f"{bits} bit" if bits else f"quantised ({plain.get('quant_method', 'unknown')})")
    return ", ".join(words)


def _device(asked: torch.device | str | None) -> str:
    """A device that this machine has, by its full name.

    Raises:
        ModelError: there is none of that name.
    """
    if asked is None:
        return accelerator()
    name, there = str(asked), devices()
    if name in there or name == "meta":
        return name
    if name in ("cuda", "xpu") and (first := next((one for one in there if one.startswith(name)), None)):
        return first
    raise ModelError(f"device {name!r}: this machine has {', '.join(there)}; give one of them, or leave it out")


def _check_dtype(dtype: Any, device: str) -> None:
    """Refuse a precision that a device cannot compute in, by computing in it.

    Raises:
        ModelError: it cannot.
    """
    if device == "meta":
        return
    try:
        one = torch.ones(2, 2, dtype=dtype, device=device)
        torch.softmax(one @ one, dim=-1)
    except (RuntimeError, TypeError) as error:
        name = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"dtype {name!r}: {device} does not compute in it ({str(error).splitlines()[0][:120]}); give float32, or "
            "another device"
        ) from None


def _quantisation(asked: str) -> Any:
    """What makes weights small while they are loaded.

    Raises:
        ModelError: the library is missing.
    """
    import transformers

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantize {asked!r} needs bitsandbytes; {_EXTRA}")
    if asked == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _attention(asked: str) -> str:
    """A way to compute attention that transformers has; names of the hub, which would fetch code, are refused too.

    Raises:
        ModelError: there is none of that name.
    """
    from transformers import AttentionInterface

    known = ["eager", *(name for name in AttentionInterface().valid_keys() if "|" not in name)]
    if asked not in known:
        raise ModelError(f"attn {asked!r}: no such attention; there are: {', '.join(sorted(known))}")
    return asked
