"""Whether a module does what its class says, and nothing else.

A fused operation takes the weights of several modules and calls none of them: a hook, a LoRA
wrapper, a parametrization or a parallel plan on one of those would do nothing, silently. Whoever
would go past a module asks here first, and calls it where the answer is no.
"""

from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

Kind = TypeVar("Kind", bound=type[nn.Module])

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
ORDINARY = (nn.Parameter, torch.Tensor, FakeTensor)

# Each class that may be gone past, and the forward that is meant: a class can be patched too.
_forwards: dict[type[nn.Module], Callable] = {
    nn.Embedding: nn.Embedding.forward,
    nn.ModuleList: nn.ModuleList.forward,
}


def transparent(kind: Kind) -> Kind:
    """Class decorator: of a plain module of exactly this class, the weights say it all."""
    _forwards[kind] = kind.forward
    return kind


def altered(module: nn.Module, *, may_have_bias: bool = False) -> str | None:
    """What keeps a module from being gone past, in words; None where nothing does. Who goes past it
    may know of its bias."""
    kind, own = type(module), module.__dict__
    if kind not in _forwards:
        return f"it is a {kind.__name__}"
    if _forwards[kind] is not kind.forward or "forward" in own:
        return "its forward was replaced"
    # One by one: this runs 37 times a decoded token of a model of 6 layers.
    if own["_forward_pre_hooks"] or own["_forward_hooks"]:
        return "it has a hook"
    if own["_backward_pre_hooks"] or own["_backward_hooks"]:
        return "it has a hook"
    if own["_parameters"].get("bias") is not None and not may_have_bias:
        return "it has a bias"
    if own.get("max_norm") is not None:
        return "it has a max_norm"
    return "there is a global hook on all modules" if _has_any_global_hook() else None


def altered_part(model: nn.Module, biased: Collection[str] = ()) -> str | None:
    """Which module of a model keeps it from being gone past, and how; None where none does. Those
    called as in `biased` have a bias."""
    for name, module in model.named_modules():
        if why := altered(module, may_have_bias=name.rpartition(".")[2] in biased):
            return f"of {name or 'the model'}, {why}"
    return "its logits were replaced" if "logits" in model.__dict__ else None


def plain(*modules: nn.Module) -> bool:
    """Whether a fused operation may take these modules' weights instead of calling them.

    A weight that is a tensor only by name (quantised, sharded) has to be multiplied as it says.
    """
    for module in modules:
        if altered(module) or type(module._parameters.get("weight")) not in ORDINARY:
            return False
    return True
