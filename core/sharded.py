"""What a rank has of a sharded model: which modules, which part of a tensor, which copy."""

import math

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from puna.core.checkpoint.pieces import Block


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Register the sharded parameters: a forward without gradients leaves the root's whole."""
    for module in sharded_modules(model):
        module.reshard()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(parameter: Tensor) -> int:
    """How many ranks hold the same part of a parameter as this one."""
    if not isinstance(parameter, DTensor):
        return 1
    return math.prod(parameter.device_mesh.size(each) for each in _repeated(parameter))


def is_first_copy(parameter: Tensor) -> bool:
    """Whether this rank is the first of those that hold this part of a parameter."""
    if not isinstance(parameter, DTensor):
        return True
    return all(parameter.device_mesh.get_local_rank(each) == 0 for each in _repeated(parameter))


def _repeated(parameter: DTensor) -> list[int]:
    """The dimensions of its mesh along which all ranks have the same."""
    return [number for number, each in enumerate(parameter.placements) if each.is_replicate()]


def own_part(parameter: Tensor) -> Block:
    """Which part of the whole parameter is here."""
    shape, begin = tuple(parameter.shape), (0,) * parameter.dim()
    if isinstance(parameter, DTensor):
        shape, begin = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    return tuple(slice(b, b + size) for b, size in zip(begin, shape, strict=True))
