"""LoRA adapters as peft writes them, merged into their base model as it is read.

W + scale B A, with the scale lora_alpha / r (or / sqrt(r)). Formed in fp32 and rounded once to the
type of W. Source: Hu et al. 2021; the folder's format: peft's `save_pretrained`.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.core.checkpoint.source import Source, as_type
from puna.core.checkpoint.tensor_files import Stored, read_header, read_tensor
from puna.core.documents import as_name, field, read_object, shortened
from puna.core.parameters import HEADS, parameter_shapes

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
REMEDY = "merge it with peft (merge_and_unload), save that and give its folder"


class _Pair(NamedTuple):
    """The names of one matrix's two factors, and what their product is multiplied by."""

    a: str
    b: str
    scale: float


def merged(folder: Path, open_base: Callable[[Path], Source], tokenizer: Path | None) -> Source:
    """The base model with the adapter in `folder` merged; `tokenizer` is the folder's own, if any.

    Raises ValueError where the adapter is damaged, of another kind than LoRA or does not fit, and
    where its base model is not on this machine.
    """
    settings = read_object(folder / SETTINGS)
    try:
        alpha, rooted = _scaling(settings)
        named = field(settings, "base_model_name_or_path", str)
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS}: {error}") from error
    base = open_base(_base(folder, named))
    file = folder / WEIGHTS
    stored = read_header(file)
    head = "score" if any(name.endswith(HEADS["score"]) for name in stored) else base.head
    shapes = parameter_shapes(base.config, head)
    pairs, whole = _parts(file, stored, shapes, alpha, rooted)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        seen = set()
        for name, tensor in base.tensors():
            if name in HEADS.values() and name != HEADS[head]:
                continue
            seen.add(name)
            if name in whole:
                tensor = as_type(name, read_tensor(file, whole[name]), tensor.dtype)
            yield name, _sum(file, name, tensor, pairs[name]) if name in pairs else tensor
        for name in whole.keys() - seen:  # a head that the base model has not
            yield name, as_type(name, read_tensor(file, whole[name]), base.dtype)

    return base._replace(head=head, tokenizer=tokenizer or base.tokenizer, tensors=tensors)


def _scaling(settings: dict[str, Any]) -> tuple[float, bool]:
    """(lora_alpha, whether it is divided by sqrt(r)); ValueError for what is no plain LoRA."""
    kind = field(settings, "peft_type", str, "LORA")
    if kind != "LORA":
        raise ValueError(f"an adapter of the kind {as_name(kind)}; Puna merges LORA: {REMEDY}")
    for key in ("use_dora", "fan_in_fan_out", "alpha_pattern", "layer_replication"):
        if settings.get(key):
            raise ValueError(f"{key} = {shortened(settings[key])} is not merged here; {REMEDY}")
    if field(settings, "bias", str, "none") != "none":
        raise ValueError(f"it has biases, which a Llama 2 has not; {REMEDY}")
    alpha = field(settings, "lora_alpha", float)
    return alpha, field(settings, "use_rslora", bool, False)


def _base(folder: Path, named: str) -> Path:
    """Where the base model is: as named, or beside the adapter."""
    for place in (Path(named), folder / named, folder.resolve().parent / Path(named).name):
        if (place / "config.json").is_file() or (place.suffix == ".gguf" and place.is_file()):
            return place
    raise ValueError(
        f"{folder} is a LoRA adapter of {as_name(named)}, which is not on this machine; fetch that "
        f"and write its folder into base_model_name_or_path of {folder / SETTINGS}"
    )


def _parts(
    file: Path,
    stored: dict[str, Stored],
    shapes: dict[str, tuple[int, ...]],
    alpha: float,
    rooted: bool,
) -> tuple[dict[str, _Pair], dict[str, str]]:
    """(our name -> its pair of factors, our name -> the tensor that takes its place)."""
    pairs: dict[str, _Pair] = {}
    whole: dict[str, str] = {}
    for name, view in stored.items():
        # Of an embedding or a head peft stores the base model's weight, too.
        ours = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name.endswith(B) and name[: -len(B)] + A in stored:
            continue
        if name.endswith(A):
            ours, other = ours.removesuffix(A) + ".weight", name.removesuffix(A) + B
            rank = view.shape[0] if len(view.shape) == 2 else 0
            found = stored[other].shape if other in stored else ()
            if not rank or ours not in shapes or (*found, *view.shape) != (
                shapes[ours][0], rank, rank, shapes[ours][-1],
            ):  # fmt: skip
                raise ValueError(f"{file}: {as_name(name)} does not fit its base model; {REMEDY}")
            pairs[ours] = _Pair(name, other, alpha / (math.sqrt(rank) if rooted else rank))
        elif shapes.get(ours) == view.shape:
            whole[ours] = name
        else:
            raise ValueError(f"{file}: {as_name(name)} is not merged here; {REMEDY}")
    if not pairs and not whole:
        raise ValueError(f"{file} holds no adapter; save it again")
    return pairs, whole


def _sum(file: Path, name: str, weight: Tensor, pair: _Pair) -> Tensor:
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    b, a = (read_tensor(file, factor).to(kind) for factor in (pair.b, pair.a))
    total = torch.addmm(weight.to(kind), b, a, alpha=pair.scale)
    return as_type(name, total, weight.dtype)
