"""AdamW's state in and out of checkpoints: each rank has its own pieces, whatever the layout."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puna.core.checkpoint.pieces import Piece, Sliced
from puna.core.model import Transformer
from puna.core.offload import MOMENTS, at_hand, is_offloaded
from puna.core.ranks import is_main, world_size
from puna.core.sharded import is_first_copy, local, own_part, reshard


def optimizer_state(model: Transformer, optimizer: Optimizer) -> dict[str, Piece]:
    """This rank's pieces of AdamW's state, on the CPU: `<parameter>.exp_avg`, `.exp_avg_sq` and, on
    rank 0, `.step`. Of several ranks they are copies, to be written while training goes on.

    What has had no gradient yet has no state and no entry; of several copies of a parameter the
    first has all.
    """
    reshard(model)
    pieces: dict[str, Piece] = {}
    # What is put away again, or changes while it is written, has to be copied.
    copy = world_size() > 1 or is_offloaded(optimizer)
    with at_hand(optimizer):
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter, {})
            begin = tuple(each.start for each in own_part(parameter))
            for key in MOMENTS if state and is_first_copy(parameter) else ():
                if (moment := local(state[key])).numel():
                    pieces[f"{name}.{key}"] = Piece(_on_host(moment, copy), begin)
            if state and is_main():
                pieces[f"{name}.step"] = Piece(_on_host(local(state["step"]), copy), ())
    return pieces


def _on_host(tensor: Tensor, copy: bool) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=copy)


def load_optimizer_state(
    model: Transformer, optimizer: Optimizer, tensors: Mapping[str, Sliced]
) -> None:
    """Put the state that was saved into a new optimizer, for any number of ranks.

    `tensors` are whole, or lie in files (`pieces.open_pieces`): each rank takes its own part. Of a
    model that was never stepped there are none. Raises ValueError where they are not this model's,
    or not all of them.
    """
    reshard(model)
    parameters = dict(model.named_parameters())
    unknown = sorted({key.rpartition(".")[0] for key in tensors} - set(parameters))
    if unknown:
        raise ValueError(
            f"the optimizer state has {unknown[0]}, which the model has not; resume with the "
            "model that it was saved with"
        )
    wanted = {f"{name}.{key}" for name in parameters for key in ("step", *MOMENTS)}
    if tensors and (missing := sorted(wanted - set(tensors))):
        raise ValueError(
            f"the optimizer state has no {missing[0]}; moments that began anew would make another "
            "run of it: resume from a checkpoint that is whole"
        )
    # A fused optimizer counts its steps where the weights are, any other on the CPU.
    fused = {p for group in optimizer.param_groups if group["fused"] for p in group["params"]}
    for name, parameter in parameters.items() if tensors else ():
        device = parameter.device if parameter in fused else "cpu"
        state = {"step": tensors[f"{name}.step"][()].to(device, copy=True)}
        for moment in MOMENTS:
            state[moment] = _like(parameter, tensors[f"{name}.{moment}"], f"{name}.{moment}")
        optimizer.state[parameter] = state
    with at_hand(optimizer):
        pass  # they are put where they belong between steps


def _like(parameter: Tensor, whole: Sliced, name: str) -> Tensor:
    """A copy of this rank's part of `whole`, sharded and placed as the parameter is."""
    if tuple(whole.shape) != tuple(parameter.shape):
        raise ValueError(
            f"{name} is {tuple(whole.shape)} where the model's is {tuple(parameter.shape)}; "
            "resume with the model that it was saved with"
        )
    kept = torch.empty_like(local(parameter).detach()).copy_(whole[own_part(parameter)])
    if not isinstance(parameter, DTensor):
        return kept
    return DTensor.from_local(
        kept,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
