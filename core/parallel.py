"""Parallelism applied to a model from outside: FSDP2 over all processes that torchrun started, and
tensor parallelism inside of it.

The model file knows nothing of it. One process, no group: every function here is then the
plain thing. Gradients are summed over the ranks, not averaged, since the loss is divided by
the weight sum of the whole batch. Blocks are one group each; the embedding, the final norm and
the head share the root's, which stays whole from a forward until its backward: so
the head, used outside forward, is the full matrix, and its gradient is reduced at
the end of that backward.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from puna.core import sequence_parallel, tensor_parallel
from puna.core.checkpoint.source import Source
from puna.core.config import ModelConfig
from puna.core.documents import count_of
from puna.core.model import Transformer
from puna.core.offload import MOMENTS as MOMENTS
from puna.core.optimizer_state import load_optimizer_state as load_optimizer_state
from puna.core.optimizer_state import optimizer_state as optimizer_state
from puna.core.parameters import check_parameters
from puna.core.plain import HOOKS, altered
from puna.core.ranks import all_max as all_max
from puna.core.ranks import all_sum as all_sum
from puna.core.ranks import background as background
from puna.core.ranks import barrier as barrier
from puna.core.ranks import broadcast as broadcast
from puna.core.ranks import close as close
from puna.core.ranks import gather as gather
from puna.core.ranks import init as init
from puna.core.ranks import is_main as is_main
from puna.core.ranks import on_all as on_all
from puna.core.ranks import on_main as on_main
from puna.core.ranks import patient
from puna.core.ranks import rank as rank
from puna.core.ranks import same as same
from puna.core.ranks import wait_at_most as wait_at_most
from puna.core.ranks import world_size as world_size
from puna.core.sharded import copies, full, local, own_part, reshard, sharded_modules


class Share(NamedTuple):
    """Which part of the rows: one of `ranks` equal ones."""

    rank: int
    ranks: int


@torch.no_grad()
def load(
    source: Source, device: torch.device | str, *, frozen: bool = False, **options: Any
) -> Transformer:
    """A model from its source, `prepare`d with `options`: in fp32, or `frozen` in the dtype that it
    computes in, without gradients.

    Each rank reads its part of tensor after tensor: of a mapped file only that.
    """
    with torch.device("meta"):
        model = Transformer(source.config, source.head)
    if frozen:
        model = model.to(options.get("compute_dtype") or torch.float32).requires_grad_(False)
    model = prepare(model, device=device, **options).to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name, tensor in source.tensors():
        local(parameters[name]).copy_(tensor[own_part(parameters[name])])
    return model


def prepare(
    model: Transformer,
    *,
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | None = None,
    checkpointing: str = "none",
    compile: bool = False,
    sampling_tp: int = 1,
    replicate: int = 1,
    tp: int = 1,
) -> Transformer:
    """The model made ready to train on all ranks, in place; `load` also reads its weights.

    Tensor parallelism -> compile -> checkpointing -> FSDP2, the last three a block at a time.
    Weights stay in the dtype they are in (fp32); `compute_dtype` is what they are gathered and
    multiplied in, with gradients reduced in fp32. On one rank FSDP2 does that cast too, over a
    group of one; without a `compute_dtype` one rank needs no FSDP2. `device` says where a model on
    "meta" is going to be. `checkpointing` "full" recomputes every block in the backward pass,
    "selective" every second one.

    `tp` neighbouring ranks work on the same tokens, each with a part of every block
    (`sequence_parallel`). `sampling_tp` neighbouring ranks share what `gathered` yields. With
    `replicate` copies of the model, each is sharded over neighbouring ranks, one machine's, and
    gradients are also summed over the copies (HSDP). ValueError where the model or the ranks
    cannot be shared out so.
    """
    tensor_parallel.check(model.config, sampling_tp)
    check(model.config, replicate, tp)
    sharded = world_size() > 1 or compute_dtype is not None
    kind = torch.device(device or model.device).type
    blocks, root, group = _meshes(kind, replicate, tp) if sharded else (None, None, None)
    if group is not None:
        sequence_parallel.cut(model, group, _replace_forward)
    every = {"none": 0, "selective": 2, "full": 1}[checkpointing]
    for number, block in enumerate(model.model.layers, 1):
        if compile:
            _replace_forward(block, _compiled(block.forward))
        if every and number % every == 0:
            _replace_forward(block, _checkpointed(block.forward))
    if not sharded:
        return model
    # Inputs are left as they are: the embedding is in the compute dtype, RoPE's tables are fp32.
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=blocks, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=root, mp_policy=policy, reshard_after_forward=False)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.__dict__ |= {
        "compute_dtype": compute_dtype,
        "sampling_tp": sampling_tp,
        "replicate": replicate,
        "tp": tp,
    }
    return model


def check(config: ModelConfig, replicate: int, tp: int) -> None:
    """ValueError where a model of this shape, or the ranks, cannot be shared out so."""
    tensor_parallel.check(config, tp, "tp")
    if world_size() % (replicate * tp):
        said = f"{replicate} and tp {tp}, together {replicate * tp}," if tp > 1 else f"{replicate}"
        raise ValueError(
            f"replicate is {said} and no divisor of {count_of(world_size(), 'rank')}; take one"
        )


def _meshes(kind: str, replicate: int, tp: int) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh | None]:
    """What blocks are sharded over, what embedding, final norm and head are (all ranks of a copy),
    and the ranks that work on the same tokens."""
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    outer, names = ((replicate,), ("replicate",)) if replicate > 1 else ((), ())
    size = world_size() // replicate
    root = init_device_mesh(kind, (*outer, size), mesh_dim_names=(*names, "shard"))
    if tp == 1:
        patient(*root.get_all_groups())
        return root, root, None
    dims = (*names, "shard", "tp")
    mesh = init_device_mesh(kind, (*outer, size // tp, tp), mesh_dim_names=dims)
    patient(*root.get_all_groups(), *mesh.get_all_groups())
    return mesh[dims[:-1]], root, mesh["tp"]


def share(tp: int = 1) -> Share:
    """This rank's share of the rows, where `tp` neighbouring ranks work on the same ones."""
    return Share(rank() // tp, world_size() // tp)


def tp_of(model: Transformer) -> int:
    """How many neighbouring ranks work on the same rows."""
    return model.__dict__.get("tp", 1)


def counted(number: int, model: Transformer) -> int:
    """The sum over all ranks that have rows of their own."""
    return int(all_sum(torch.tensor(number))) // tp_of(model)


def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """How many sequences there are, and how many tokens are wanted, differs from batch to batch:
    compiled for one number first, train, evaluation and batches of which all is wanted together
    reached dynamo's limit of graphs, and blocks were then run as they are."""
    compiled = torch.compile(forward)

    def of_any_number(
        x: Tensor,
        rotary: Any,
        cu_seqlens: Tensor | None = None,
        cache: Any = None,
        shared: Any = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        for each in (cu_seqlens, wanted):
            if each is not None:
                torch._dynamo.maybe_mark_dynamic(each, 0)
        return compiled(x, rotary, cu_seqlens, cache, shared, wanted)

    return of_any_number


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Put `forward` before the class's own: unlike a wrapper module it renames no parameter,
    and FSDP2's hooks stay outside what is recomputed or compiled. Noted as `prepared`: itself,
    and what somebody else had put there before."""
    own = module.__dict__
    before = own["prepared"][1] if "prepared" in own else own.get("forward")
    own["prepared"] = forward, before
    own["forward"] = forward


@contextmanager
def _unprepared(model: Transformer) -> Iterator[None]:
    """The modules without what `prepare` put before them, but with what others have changed."""
    prepared = [module.__dict__ for module in model.modules() if _is_prepared(module)]
    for own in prepared:
        before = own["prepared"][1]
        own.pop("forward") if before is None else own.update(forward=before)
    try:
        yield
    finally:
        for own in prepared:
            own["forward"] = own["prepared"][0]


def _is_prepared(module: nn.Module) -> bool:
    own = module.__dict__
    return "prepared" in own and own.get("forward") is own["prepared"][0]


@contextmanager
def gathered(model: Transformer) -> Iterator[Transformer]:
    """A model to generate with, its weights gathered once for the whole context (collective).

    The paper, section 3.2.3: generating from sharded weights is about 20 times slower, so they are
    gathered once onto each node. The yielded model is in the compute dtype, a plain one, whole on
    every rank; or `prepare`d with `sampling_tp`, so many neighbouring ranks share one
    (`tensor_parallel`). Its weights are freed at the end. On one unsharded rank it is `model`
    itself, without checkpointing or compile. Raises ValueError where a sharded model has adapters
    or hooks, which the plain one has not.
    """
    if not isinstance(model, FSDPModule):
        with _unprepared(model):
            yield model
        return
    with _unprepared(model):
        _check_copyable(model)
    reshard(model)
    size = model.__dict__["sampling_tp"]
    if size > 1:
        group = tensor_parallel.group_of(size)
        yield tensor_parallel.cut(model.config, _computing_parameters(model), group)
        return
    with torch.device("meta"):
        whole = Transformer(model.config, model.head)
    for name, tensor in _computing_parameters(model):
        owner, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(owner), leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    yield whole


def _computing_parameters(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, whole, in the dtype it computes in, until the next is asked for:
    FSDP2 gathers a block in one piece (a piece for each parameter took half as long again)."""
    for prefix, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            for name, parameter in cast(nn.Module, module).named_parameters(prefix):
                if module is not model or not name.startswith("model.layers."):
                    yield name, full(parameter.detach())
            module.reshard()


def _check_copyable(model: Transformer) -> None:
    """ValueError where a plain model with the same weights would compute something else."""
    check_parameters(model, model.config, model.head)
    for name, module in model.named_modules():
        if why := _altered_beside_fsdp(module):
            raise ValueError(
                f"a sharded model is sampled from a plain copy, but of {name or 'the model'} "
                f"{why}: take that away, or merge it into the weights"
            )


def _altered_beside_fsdp(module: nn.Module) -> str | None:
    """`altered`, but for the class and the hooks that PyTorch's parallelism gives a module."""
    hooks = [hook for name in HOOKS for hook in module.__dict__[name].values()]
    ours = [hook for hook in hooks if hook.__module__.startswith("torch.distributed.")]
    if len(ours) < len(hooks):
        return "it has a hook"
    if not ours and not isinstance(module, FSDPModule):
        return altered(module)
    return "its forward was replaced" if "forward" in module.__dict__ else None


def full_parameters(
    model: Transformer, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter that is `wanted` here, by the plain model's name, whole and on the CPU, one
    at a time.

    Collective: every rank must go through to the end, whatever it wants. Raises ValueError where
    adapters are not merged.
    """
    check_parameters(model, model.config, model.head)
    reshard(model)
    for name, parameter in model.named_parameters():
        whole = full(parameter.detach())
        if wanted(name):
            yield name, whole.cpu()


def begin_pass(model: Transformer, *, is_last: bool) -> None:
    """Before each of the forward and backward passes whose gradients are accumulated: copies of a
    model need not agree before the last one. (Parts are added up in each: they have no room for
    whole gradients.)"""
    if isinstance(model, FSDPModule) and model.__dict__["replicate"] > 1:
        model.set_requires_all_reduce(is_last)


def clip_gradients(model: Transformer, max_norm: float) -> float:
    """Scale all gradients so that their norm over all ranks is at most `max_norm`; returns
    the norm before."""
    reshard(model)
    trained = [p for p in model.parameters() if p.grad is not None]
    gradients = [local(p.grad) for p in trained if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(gradients)).square()
    if sharded_modules(model):
        squares = all_sum((squares / squares.new_tensor([copies(p) for p in trained])).sum())
    norm = squares.sum().sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
