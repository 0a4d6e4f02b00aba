"""Copies of modules for trying things out: the same parameters, no hooks, and single parameters replaced."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["bare_copy", "put_parameter"]


def bare_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with the same parameters and without anybody's hooks, in evaluation mode.

    Args:
        module: any; it is left as it is.
    """
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if "_hooks" in name and isinstance(value, dict):
            twin.__dict__[name] = OrderedDict()
    if "_hf_hook" in twin.__dict__:  # accelerate's, whose `forward` runs the module and not its copy
        del twin.__dict__["_hf_hook"]
        twin.__dict__.pop("forward", None)
    twin.__dict__["_compiled_call_impl"] = None
    twin.__dict__["training"] = False
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = {
        name: None if child is None else bare_copy(child) for name, child in module._modules.items()
    }
    return twin


def put_parameter(twin: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in a parameter's place.

    Args:
        twin: what `bare_copy` gave.
        name: the parameter's name in it.
        value: [...] of the parameter's shape.
    """
    path, _, leaf = name.rpartition(".")
    kept = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), requires_grad=False)
    twin.get_submodule(path)._parameters[leaf] = kept
