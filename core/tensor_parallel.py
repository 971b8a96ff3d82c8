"""One model over several ranks for sampling: each holds a part of every layer (Megatron-LM's cut).

Query, key and value heads, the FFN's hidden units and the head's vocabulary are shared out; what
comes back from attention and from the FFN is summed over the ranks, and logits are put together, so
that every rank draws the same tokens. Norms and the embedding are whole on each.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puna.core import ops, ranks
from puna.core.checkpoint.source import Source
from puna.core.config import ModelConfig
from puna.core.generation.generate import Completion, generate
from puna.core.generation.kv_cache import CACHE_BYTES
from puna.core.generation.stopping import Stops
from puna.core.model import Linear, Transformer

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # each rank has some outputs
COLUMNS = ("o_proj", "down_proj")  # each rank has some inputs; its product is a summand


class Group(NamedTuple):
    """The ranks that share a model: `size` neighbours, of which this is number `rank`."""

    process_group: Any
    size: int
    rank: int


class Summed(Linear):
    """A projection of which each rank has some inputs: the ranks' products are added up."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        y = ops.linear(x, self.weight)
        dist.all_reduce(y, group=self.group.process_group)
        return y if self.bias is None else y + self.bias  # once, not once a rank


class Joined(Linear):
    """A head of which each rank has a part of the vocabulary: whole logits on every rank."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        part = ops.linear(x, self.weight).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.group.size)]
        dist.all_gather(parts, part, group=self.group.process_group)
        return torch.cat(parts, -1)


def check(config: ModelConfig, size: int, called: str = "sampling_tp") -> None:
    """ValueError where a model cannot be cut in `size` parts, or the ranks not in such groups;
    `called`: the option that asked for it."""
    if size == 1:
        return
    world = ranks.world_size()
    if world % size:
        raise ValueError(
            f"{called} is {size} and there {'are' if world > 1 else 'is'} {world} "
            f"rank{'s' * (world > 1)}, no multiple of it; "
            f"{'start more ranks with torchrun' if world < size else 'take a divisor'}"
        )
    for name in ("n_kv_heads", "ffn_dim"):
        if getattr(config, name) % size:
            raise ValueError(
                f"{called} is {size} and the model's {name} is {getattr(config, name)}, no "
                "multiple of it; take a smaller one"
            )


def load(
    source: Source, size: int, device: torch.device, dtype: torch.dtype, called: str
) -> Transformer:
    """This rank's part of a stored language model, for `size` ranks to generate with.

    Every rank reads its part of tensor after tensor: of a mapped file only that. Raises ValueError
    as `check` does.
    """
    if source.head != "lm":
        raise ValueError(f"{called} is for generation, and this model has a score head")
    check(source.config, size, called)
    return cut(source.config, source.tensors(), group_of(size), device, dtype)


def group_of(size: int) -> Group:
    """This rank's group of `size` neighbours (collective the first time)."""
    return Group(_process_group(size, dist.group.WORLD), size, ranks.rank() % size)


@lru_cache
def _process_group(size: int, world: Any) -> Any:
    """Made once for each set of all ranks: NCCL takes seconds."""
    if size == world.size():
        return world
    group = dist.new_subgroups(group_size=size)[0]
    ranks.patient(group)
    return group


@torch.no_grad()
def cut(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    group: Group,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Transformer:
    """This rank's part of a language model, from its whole tensors by name, one at a time; in
    their own `dtype` where none is given.

    Its config counts the key/value heads that are here: the cache is as large as they need.
    """
    with torch.device("meta"):
        model = Transformer(config)
    for name in [name for name, _ in model.named_modules() if name.endswith(COLUMNS)]:
        owner, _, leaf = name.rpartition(".")
        _put(model.get_submodule(owner), leaf, Summed, group)
    spread = config.vocab_size % group.size == 0
    if spread:
        _put(model, "lm_head", Joined, group)
    for name, whole in tensors:
        owner, _, leaf = name.rpartition(".")
        mine = part(name, whole, group, spread).to(device=device, dtype=dtype, copy=True)
        del whole
        setattr(model.get_submodule(owner), leaf, nn.Parameter(mine, requires_grad=False))
    model.config = replace(config, n_kv_heads=config.n_kv_heads // group.size)
    model.__dict__["group"] = group
    return model


def _put(module: nn.Module, name: str, kind: type[Summed] | type[Joined], group: Group) -> None:
    with torch.device("meta"):
        cut_one = kind(1, 1)
    cut_one.group = group
    setattr(module, name, cut_one)


def part(name: str, whole: Tensor, group: Group, spread: bool = True) -> Tensor:
    """What a rank holds of a parameter, a view; `spread`: the vocabulary is shared out, too."""
    module = name.split(".")[-2]
    if module in ROWS or (module == "lm_head" and spread):
        return whole.chunk(group.size, 0)[group.rank]
    if module in COLUMNS and whole.dim() > 1:  # a bias is added to the sum
        return whole.chunk(group.size, 1)[group.rank]
    return whole


def generate_together(
    model: Transformer,
    prompts: list[list[int]],
    *,
    prompt_ids: list[int],
    sample_ids: list[int],
    stops: Stops | None = None,
    **options: Any,
) -> list[Completion]:
    """`generate` of this rank's prompts, each rank with its own; ranks that share a model continue
    all of theirs side by side (collective where there are any). All have `stops` or none has."""
    group: Group | None = model.__dict__.get("group")
    if group is None:
        return generate(
            model, prompts, prompt_ids=prompt_ids, sample_ids=sample_ids, stops=stops, **options
        )
    options = {"cache_bytes": CACHE_BYTES, **options}  # the same on all: what is free is not
    known = [[]] * len(prompts) if stops is None else stops.known
    mine = list(zip(prompts, prompt_ids, sample_ids, known, strict=True))
    first = ranks.rank() - group.rank
    members = ranks.gather(mine)[first : first + group.size]
    rows = [row for member in members for row in member]
    found = generate(
        model,
        [list(row[0]) for row in rows],
        prompt_ids=[row[1] for row in rows],
        sample_ids=[row[2] for row in rows],
        stops=stops and stops._replace(known=[row[3] for row in rows]),
        **options,
    )
    before = sum(map(len, members[: group.rank]))
    return found[before : before + len(mine)]
