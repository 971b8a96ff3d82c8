"""One model over several ranks for training: tensor parallelism with sequence parallelism.

Ranks of a group work on the same tokens (Megatron-LM's cut, by PyTorch's own styles): query, key
and value heads and the FFN's hidden units are shared out; between those, at embedding, norms and
sums, each rank has a part of the tokens of every row. Tokens are gathered before attention and
before the FFN and what comes out is added up and cut again. The final hidden states are gathered,
so that every rank computes the same loss: whoever adds losses up over all ranks counts each as
often as a group has ranks, in the sum of weights, too, and gradients are added up likewise.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.functional import pad

from puna.core import ops
from puna.core.generation.kv_cache import KVCache
from puna.core.model import Block, RMSNorm, Rotary, Transformer
from puna.core.shared import Shared, of_wanted

Replace = Callable[[nn.Module, Callable[..., Tensor]], None]


def cut(model: Transformer, mesh: DeviceMesh, replace: Replace) -> None:
    """Cut the model's blocks over the ranks of `mesh`, in place; `replace` puts a forward before a
    module's own."""
    # It warns, on every rank, that a parameter cut twice is gathered in two steps: as it is here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for block in model.model.layers:
        assert isinstance(block, Block)
        parallelize_module(block, mesh, _plan())
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            distribute_module(norm, mesh)
            replace(norm, functools.partial(_norm, norm))
    embedding = model.model.embed_tokens
    replace(embedding, functools.partial(_own_tokens, embedding.forward, mesh))
    replace(model.model, functools.partial(_in_parts, model.model.forward, mesh))


def _plan() -> dict[str, ParallelStyle]:
    def whole_tokens(others: int) -> PrepareModuleInput:
        rest = (None,) * others
        return PrepareModuleInput(
            input_layouts=(Shard(1), *rest), desired_input_layouts=(Replicate(), *rest)
        )

    return {
        "self_attn": whole_tokens(5),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "mlp": whole_tokens(0),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """Of this rank's tokens: the kernels take plain tensors, and the weight's gradient is a
    summand. (PyTorch's SequenceParallel would hand them a distributed one.)"""
    weight: Tensor = norm.weight
    assert isinstance(weight, DTensor)
    return ops.rms_norm(x, weight.to_local(grad_placements=[Partial()]), eps=norm.eps)


def _own_tokens(embed: Callable[..., Tensor], mesh: DeviceMesh, tokens: Tensor) -> Tensor:
    return embed(tokens.chunk(mesh.size(), 1)[mesh.get_local_rank()])


def _in_parts(
    forward: Callable[..., Tensor],
    mesh: DeviceMesh,
    tokens: Tensor,
    rotary: Rotary,
    cu_seqlens: Tensor | None,
    cache: KVCache | None,
    shared: Shared | None,
    wanted: Tensor | None,
) -> Tensor:
    """The decoder's hidden states (B, T, C), whole on every rank; tokens (B, T) are filled up to a
    multiple of the ranks on the way. (What is not `wanted` is run through the last layer, too: the
    rest would be shared out unevenly.)"""
    assert cache is None, "it is sampled from a gathered copy"
    shape = tokens.shape
    if cu_seqlens is not None and shape[0] > 1:  # sequences laid end to end over the rows
        rotary = Rotary(*(_of_rows(each, *shape) for each in rotary))
        tokens = tokens.reshape(1, -1)
    if more := -tokens.shape[1] % mesh.size():
        tokens = pad(tokens, (0, more))
        rotary = Rotary(*(pad(each, (0, 0, 0, more)) for each in rotary))
        if cu_seqlens is not None:
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + more])
        shared = shared and shared.padded(more)
    part = DTensor.from_local(
        forward(tokens, rotary, cu_seqlens, None, shared, None), mesh, [Shard(1)], run_check=False
    )
    whole = part.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    # A tensor of its own: FSDP2 warns of views, which could be written to.
    whole = whole[:, : whole.shape[1] - more].reshape(*shape, -1)
    return whole.clone() if wanted is None else of_wanted(whole, wanted)


def _of_rows(table: Tensor, rows: int, tokens: int) -> Tensor:
    """The angles (1, rows * tokens, D/2) of all rows, from those of each or from the tables."""
    if table.dim() == 2:
        table = table[:tokens].expand(rows, -1, -1)
    return table.reshape(1, rows * tokens, -1)
