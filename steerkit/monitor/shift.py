"""Tuning shift: how far finetuning has moved a model along a vector, measured before and after.

    shift = (mean over prompts of a_after - mean over prompts of a_before) . u          a: the prompt's last token

Chen, Arditi, Sleight, Evans, Lindsey (2025), "Persona Vectors: Monitoring and Controlling Character Traits in Language
Models", arXiv 2507.21509. Where this file departs: the mean comes with an interval over prompts and with the number of
each, counted in standard deviations of neutral texts under the model before finetuning unless asked otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.monitor.items import Item, Kind, Read
from steerkit.monitor.monitor import Monitor
from steerkit.network.decoder import inner_model
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Shift", "finetuning_shift", "with_adapter"]


@dataclass(frozen=True, eq=False)
class Shift:
    """How far finetuning has moved a model along a vector.

    Attributes:
        before: [n] one number per prompt.
        after: [n] the same of the finetuned model.
    """

    before: Tensor
    after: Tensor

    @property
    def values(self) -> Tensor:
        """[n] after minus before."""
        return self.after - self.before

    @property
    def estimate(self) -> Estimate:
        """The mean over prompts with its 95 % interval."""
        return interval(self.after, before=self.before, shares=False)


def finetuning_shift(
    before: nn.Module | None,
    after: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Item],
    vector: SteeringVector,
    *,
    read: Read = "prompt_last",
    kind: Kind = "proj",
    calibrated: bool = True,
    sites: Sequence[Site | str] | None = None,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Shift:
    """Measure how far finetuning has moved a model along a vector.

    Args:
        before: the model as it was; None switches the adapters of `after`, a PEFT model, off.
        after: the finetuned model.
        tokenizer: of both.
        prompts: what both read; with answers where `read` is ``"response_mean"``.
        vector: fitted on the model as it was.
        read: which tokens.
        kind: `proj` or `cos`.
        calibrated: count in standard deviations of neutral texts under the model as it was; else raw.
        sites: some of the vector's sites.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        One number per prompt and model; `estimate` is the shift with its interval.

    Raises:
        ModelError: `before` is None and `after` has no adapter, or both are the same object.
        DataError: a prompt cannot be read.
        VectorMismatchError: the vector was fitted on a model of another width or depth.
    """
    if before is None and not hasattr(after, "disable_adapter"):
        raise ModelError(f"{type(after).__name__} has no adapter to be switched off; give the model before finetuning")
    if before is not None and inner_model(before) is inner_model(after):
        raise ModelError("the models before and after finetuning are one object; load the other one too, or give None")
    options: dict[str, Any] = {"read": read, "kind": kind, "calibrated": calibrated, "sites": sites}
    options |= {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
    if before is None:
        untuned: Any = after
        with untuned.disable_adapter():
            monitor = Monitor(after, tokenizer, vector, **options)
            first = monitor.score(prompts)
    else:
        monitor = Monitor(before, tokenizer, vector, **options)
        first = monitor.score(prompts)
    # The scale stays that of the model as it was, for which the vector was fitted: the other has another name.
    other = Monitor(after, tokenizer, replace(vector, model_id=None, model_revision=None), **options)
    values = other.project(other.rendered(prompts, read=read), read)
    return Shift(first, monitor.scaled(values, differences=False))


def with_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """A model with the adapter that PEFT saved in a folder; the model itself gets the adapter's layers.

    Args:
        model: what the adapter was trained on.
        folder: with an `adapter_config.json`.

    Raises:
        ModelError: peft is not installed, or the adapter does not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(f"{folder}: reading an adapter needs peft; install it with: pip install peft") from None
    try:
        found: nn.Module = PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(f"{folder}: this adapter cannot be put on the model ({reason})") from error
    return found
