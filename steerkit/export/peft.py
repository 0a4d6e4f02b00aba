"""Vectors as a LoRA adapter: a folder that `peft` loads onto the untouched model, scales, switches off and merges.

What changes comes from each method's `weight_updates`; this file knows no method. The change of a matrix is the
difference of its new and its old values. It is taken apart by a range finder: the matrix is applied to a few random
vectors, and where the images span fewer dimensions than there are vectors, they span all of its range.

    dW = B A        B [out, r], A [r, in]          r: the rank that is found, 1 for one direction taken out or added
    db              the bias of `lora_B` (peft's `lora_bias`), with A = B = 0 where only the bias changes

The scale of every module is 1 (lora_alpha = r), so that peft's `scale_layer` is a dial from 0 to 1 where the change is
linear in the strength. A changed bias acts where the model has none, too, but merges only into one. Embeddings get
peft's own form for them; beside changed biases, which peft cannot combine with it, they are stored whole
(`modules_to_save`). Matrices that several experts share one tensor of go by `target_parameters`. All is float32.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerkit._support.files import check_folder, whole_folder
from steerkit.errors import ModelError, SiteError, StrengthError
from steerkit.export.baking import Change, changes_of
from steerkit.export.checkpoint import stored
from steerkit.export.verification import Verification, expected, logits_of, verify
from steerkit.export.weights_card import weights_card
from steerkit.model import hub_id, quiet
from steerkit.network.decoder import inner_model
from steerkit.steering.strengths import vectors_of
from steerkit.steering.weights import exact_updates
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Adapter", "low_rank", "write_adapter"]

_PREFIX = "base_model.model."
_MAX_RANK = 256


@dataclass(frozen=True)
class Adapter:
    """What was written.

    Attributes:
        folder: where.
        rank: of every module.
        modules: modules and parameters it adapts.
        whole: modules that are stored whole.
        merges: whether peft can merge it: it cannot add a bias to a layer that has none.
        verification: the comparison with the hooks.
    """

    folder: Path
    rank: int
    modules: tuple[str, ...]
    whole: tuple[str, ...]
    merges: bool
    verification: Verification


@dataclass
class _Parts:
    """The pieces of an adapter, by the name of what they adapt."""

    linear: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Linear layers: B [out, r], A [r, in]."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Linear layers: what their bias gains [out]."""
    embeddings: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Embeddings: B [d, r], A [r, vocabulary]."""
    stacks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Parameters of experts: B [(n,) out, r], A [(n,) r, in]."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Modules with one weight: its new values."""

    @property
    def rank(self) -> int:
        """The largest rank of them all."""
        found = (right.shape[-2] for part in (self.linear, self.embeddings, self.stacks) for _, right in part.values())
        return max(found, default=0) or 1


def write_adapter(
    model: nn.Module,
    tokenizer: Any,
    vectors: SteeringVector | Sequence[SteeringVector],
    out: str | Path,
    *,
    strength: float | None = None,
    force: bool = False,
) -> Adapter:
    """Write a LoRA adapter that does what vectors do at every token, load it with peft and compare it with the hooks.

    Args:
        model: the transformers model, in memory. It is as it was afterwards.
        tokenizer: its tokenizer, for the texts to compare on; None takes arbitrary tokens.
        vectors: one vector or several, which act in this order; their scope has to be `all`.
        out: the folder to make.
        strength: in the paper unit; None takes each file's suggested strength, else 1. A vector's own comes first.
        force: replace an adapter that stands there.

    Returns:
        What was written, and how far its logits are from those of the hooks.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth.
        ScopeError: a vector's scope is not `all`.
        StrengthError: a method has no exact weight form, the change has too high a rank, or the strength is not one
            finite number.
        SiteError: this architecture has no place for the exact form, or peft cannot express it.
        ModelError: peft is missing, the model has an adapter already or is offloaded, the folder cannot be written, or
            the adapter's logits are not those of the hooks; nothing is left behind.

    Example:
        write_adapter(model, tokenizer, vector.at(scope="all"), "optimism-lora", strength=2.0)
    """
    _need_peft()
    target, listed = Path(out).expanduser(), vectors_of(vectors)
    inner: Any = inner_model(model)
    check_folder(target, replace=force)
    if hasattr(model, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise ModelError(f"{type(inner).__name__} has an adapter in it already; merge or unload it first")
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise ModelError(f"{type(inner).__name__} is offloaded; load it into memory, an adapter is tried on the model")
    changes = changes_of(exact_updates(inner, listed, strength))
    parts = _parts(inner, changes)
    wanted = expected(inner, tokenizer, listed, strength)
    with whole_folder(target, replace=force) as folder, quiet():
        _write(inner, parts, folder)
        with _loaded(inner, parts, folder) as adapted:
            found = verify(logits_of(adapted, wanted.ids), wanted)
        if not found.holds:
            raise ModelError(f"{target}: not written, its logits are not those of the hooks ({found.sentence()})")
        adapter = Adapter(
            folder=target,
            rank=parts.rank,
            modules=tuple(dict.fromkeys([*parts.linear, *parts.biases, *parts.embeddings, *parts.stacks])),
            whole=tuple(parts.whole),
            merges=all(inner.get_submodule(name).bias is not None for name in parts.biases),
            verification=found,
        )
        base = hub_id(model_facts(inner)["model_id"] or "the base model")
        use = _USE.replace("{base}", base)
        card = weights_card(target.name, inner, listed, strength, found, _facts(adapter), use, library="peft")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return adapter


def low_rank(change: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Take a matrix of low rank apart.

    Args:
        change: [..., o, i] float32, the difference of two matrices.
        size: the largest entry of those matrices, whose rounding is in the difference.

    Returns:
        Left [..., o, r] and right [..., r, i], whose product it is; r is 0 if there is nothing but rounding.

    Raises:
        StrengthError: the rank is above 256.
    """
    rows, columns = change.shape[-2:]
    noise = 4 * torch.finfo(torch.float32).eps * size * (math.sqrt(rows) + math.sqrt(columns))
    generator, width = torch.Generator().manual_seed(0), 8
    while True:
        width = min(width, rows, columns)
        drawn = torch.randn(columns, width, generator=generator).to(change)
        basis = torch.linalg.qr(change @ drawn).Q
        left, sizes, right = torch.linalg.svd(basis.mT @ change, full_matrices=False)
        rank = int((sizes > noise).sum(-1).max())
        if rank > _MAX_RANK:
            raise StrengthError(f"the change of a weight has rank above {_MAX_RANK}, too high for an adapter; bake it")
        if rank < width or width == min(rows, columns):
            return (basis @ left[..., :rank]).contiguous(), sizes[..., :rank, None] * right[..., :rank, :]
        width *= 4


_USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{name}")
```"""


def _facts(adapter: Adapter) -> dict[str, str]:
    """Rows of the card."""
    shown = ", ".join(f"`{name}`" for name in adapter.modules[:4]) + (", ..." if len(adapter.modules) > 4 else "")
    facts = {"rank": f"{adapter.rank}", "adapted": f"{len(adapter.modules)}: {shown}"}
    if adapter.whole:
        facts["stored whole"] = ", ".join(f"`{name}`" for name in adapter.whole)
    facts["merges"] = "yes" if adapter.merges else "no: it adds a bias to layers that have none"
    return facts


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError(
            "adapters are written and tried with peft, which is missing; pip install 'steerkit-hf[peft]'"
        ) from None


def _parts(model: nn.Module, changes: Mapping[str, Change]) -> _Parts:
    """Turn the changes of parameters into the pieces of an adapter.

    Raises:
        SiteError: peft has no form for them.
        StrengthError: a rank is too high.
    """
    parts = _Parts()
    # peft takes a linear layer for the experts whose stack bears its name, unless it goes as a parameter as well.
    stacked = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.dim() == 3}
    has_biases = any(_is_linear_bias(model, name) for name in changes)
    for name, change in changes.items():
        path, _, leaf = name.rpartition(".")
        module, old = model.get_submodule(path), _values(model, name)
        with torch.no_grad():
            new = change(old)
        if _is_linear_bias(model, name):
            parts.biases[path] = new if old is None else new - old
            continue
        assert old is not None
        size = float(torch.maximum(old.abs().max(), new.abs().max()))
        if isinstance(module, nn.Embedding) and leaf == "weight":
            if has_biases or type(module) is not nn.Embedding:  # one of another class is called in another way
                parts.whole[path] = new
            else:
                rows, columns = low_rank(new - old, size)
                parts.embeddings[path] = columns.mT, rows.mT
        elif _is_linear(module) and leaf == "weight" and path.rpartition(".")[2] not in stacked:
            left, right = low_rank(new - old, size)
            parts.linear[path] = (right.mT, left.mT) if _inputs_first(module) else (left, right)
        elif old.dim() in (2, 3):
            left, right = low_rank(new - old, size)
            parts.stacks[name] = (right.mT, left.mT) if _inputs_first(module) and old.dim() == 3 else (left, right)
        else:
            raise SiteError(f"{name}: an adapter has no form for this parameter; bake it, or steer with hooks")
    if parts.stacks and parts.biases:
        raise SiteError(
            f"`{next(iter(parts.stacks))}` and the bias of `{next(iter(parts.biases))}` both change, and peft has no "
            "adapter for experts and biases in one; bake it, or steer with hooks"
        )
    owners = [name.rpartition(".")[0] for name in parts.stacks]
    if len(set(owners)) < len(owners):
        raise SiteError(
            f"two parameters of `{owners[0]}` change, for which peft has no plain form; bake it, or steer with hooks"
        )
    return parts


def _values(model: nn.Module, name: str) -> Tensor | None:
    """A parameter in float32; a quantised weight as what it stands for."""
    old = stored(model, name)
    if old is not None and not old.is_floating_point():
        from peft.utils.integrations import dequantize_module_weight

        old = dequantize_module_weight(model.get_submodule(name.rpartition(".")[0])).detach()
    return None if old is None else old.float().cpu()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_linear_bias(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "bias" and _is_linear(model.get_submodule(path))


def _inputs_first(module: nn.Module) -> bool:
    """Whether a weight is held as [in, out]: GPT-2's linear layers, GPT-OSS's experts."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))


def _write(model: Any, parts: _Parts, folder: Path) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`."""
    from peft import LoraConfig
    from safetensors.torch import save

    rank = parts.rank
    modules = list(dict.fromkeys([*parts.linear, *parts.biases, *parts.embeddings]))
    name = model_facts(model)["model_id"]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules or [],
        target_parameters=list(parts.stacks) or None,
        modules_to_save=list(parts.whole) or None,
        lora_bias=bool(parts.biases),
        fan_in_fan_out=any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in modules),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=None if name is None else hub_id(name),
    )
    config.save_pretrained(str(folder))
    content = save(_tensors(model, parts, rank), metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(content)


def _tensors(model: nn.Module, parts: _Parts, rank: int) -> dict[str, Tensor]:
    """The pieces under the names peft has for them, all of one rank."""
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys([*parts.linear, *parts.biases]):
        module = model.get_submodule(path)
        if path in parts.linear:
            left, right = _padded(*parts.linear[path], rank)
        else:
            width_in, width_out = _widths(module)
            left, right = torch.zeros(width_out, rank), torch.zeros(rank, width_in)
        found |= {f"{path}.lora_A.weight": right, f"{path}.lora_B.weight": left}
        if parts.biases:
            found[f"{path}.lora_B.bias"] = parts.biases.get(path, torch.zeros(len(left)))
    for path, pair in parts.embeddings.items():
        left, right = _padded(*pair, rank)
        found |= {f"{path}.lora_embedding_A": right, f"{path}.lora_embedding_B": left}
    for name, pair in parts.stacks.items():
        left, right = _padded(*pair, rank)
        if left.dim() == 3:  # peft counts ranks within experts in A, and experts within ranks in B
            left, right = left.permute(1, 2, 0).flatten(1), right.flatten(0, 1)
        path = name.rpartition(".")[0]
        found |= {f"{path}.lora_A.weight": right, f"{path}.lora_B.weight": left}
    found |= {f"{path}.weight": value for path, value in parts.whole.items()}
    return {f"{_PREFIX}{name}": value.contiguous().clone() for name, value in found.items()}


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - left.shape[-1]
    return nn.functional.pad(left, (0, more)), nn.functional.pad(right, (0, 0, 0, more))


def _widths(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


@contextlib.contextmanager
def _loaded(model: Any, parts: _Parts, folder: Path) -> Iterator[nn.Module]:
    """The model with the adapter, as anybody would load it; afterwards it is as it was."""
    from peft import PeftModel

    attributes, modules = set(vars(model)), dict(model.named_modules())
    training = [module for module in modules.values() if module.training]
    needs = {name: value.requires_grad for name, value in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            # peft tells of merging into layers without a bias, and asks for an attribute that transformers 5 renames.
            warnings.simplefilter("ignore")
            try:
                adapted = PeftModel.from_pretrained(model, str(folder))
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise SiteError(f"peft refuses this adapter ({reason}); bake it, or steer with hooks") from error
            _check_adapted(adapted, parts)
            yield adapted
    finally:
        # Not by `unload`, which leaves modules that are stored whole in the place of the model's own.
        for name, module in modules.items():
            owner, _, leaf = name.rpartition(".")
            if name and getattr(modules[owner], leaf) is not module:
                setattr(modules[owner], leaf, module)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for name, value in model.named_parameters():
            value.requires_grad_(needs[name])
        for module in training:  # peft switches all of them over
            module.training = True


def _check_adapted(adapted: nn.Module, parts: _Parts) -> None:
    """Refuse where peft has left out a module that was named.

    Raises:
        SiteError: it has.
    """
    from peft.tuners.lora import LoraLayer

    found = {name.removeprefix(_PREFIX) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    for name in (*parts.linear, *parts.biases, *parts.embeddings):
        if name not in found:
            raise SiteError(f"peft leaves out `{name}` of this architecture; bake it, or steer with hooks")
