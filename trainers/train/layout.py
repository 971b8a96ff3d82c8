"""The [parallel] table: how a model and its work are shared out over the ranks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from puna.trainers.train.ranges import Count, Options


@dataclass(kw_only=True)
class Parallel(Options):
    """How a model that is trained is shared out. None of it changes the result; its parameters are
    sharded over the ranks that `replicate` and `tp` leave."""

    replicate: Count = 1
    """copies of the model, each sharded over neighbouring ranks: with one a machine, blocks are
    gathered inside machines and only gradients travel between them; 1 shards over all ranks"""
    tp: Count = 1
    """neighbouring ranks, of one machine, that work on the same rows, each with a part of every
    block and of the tokens between them: fewer rows than ranks can be shared out"""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """recompute blocks in the backward pass: every block (a third more work, the least memory),
    every second one, or none"""
    offload: bool = False
    """keep AdamW's moments on the host between its steps: less memory, a wait for each step"""
    compile: bool = False
    """torch.compile each block"""


def of_stage(loops: Parallel, *tables: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's [parallel]: the loop's, under what the stage's own `tables` of options say."""
    found = asdict(loops)
    for table in tables:
        found |= table.get("parallel", {})
    return found
