"""A model over several ranks draws what one process draws."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import succeed

from puna.core import parallel, tensor_parallel
from puna.core.checkpoint.source import fresh
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.tensor_parallel import Group, generate_together, part

CONFIG = ModelConfig(64, 3, 8, 4, 96, 160, context=256)
ODD = ModelConfig(64, 2, 4, 2, 96, 161, context=256)  # a vocabulary that cannot be shared out
SHAPES = {"even": CONFIG, "odd": ODD}
OPTIONS = {"max_new_tokens": 128, "eos_id": 2, "temperature": 1.0, "seed": 5}


def prompts_of(rank: int) -> list[list[int]]:
    """Each rank's own, another number of them; rank 3 has none."""
    generator = torch.Generator().manual_seed(rank)
    lengths = range(4 + rank, 4 + 4 * (3 - rank) + rank)
    return [torch.randint(3, 160, (n,), generator=generator).tolist() for n in lengths]


def drawn(model: Transformer, rank: int, draw) -> list[tuple[list[int], list[float]]]:
    prompts = prompts_of(rank)
    numbers = [100 * rank + i for i in range(len(prompts))]
    found = draw(model, prompts, prompt_ids=numbers, sample_ids=[rank] * len(prompts), **OPTIONS)
    return [(completion.tokens, completion.logprobs) for completion in found]


def work(out: Path, tp: int) -> None:
    torch.set_num_threads(1)
    parallel.init()
    parallel.wait_at_most(777)
    found = {}
    for name, config in SHAPES.items():
        model = parallel.load(fresh(config, 1, "lm"), "cpu", sampling_tp=tp, tp=tp)
        before = [p.to_local().clone() for p in model.parameters()]
        with parallel.gathered(model) as whole:
            held = sum(p.numel() for p in whole.parameters())
            found[name] = {
                "held": held,
                "answers": drawn(whole, parallel.rank(), generate_together),
            }
        same = [
            torch.equal(a, b.to_local()) for a, b in zip(before, model.parameters(), strict=True)
        ]
        assert all(same)
    for group in dist.distributed_c10d._world.pg_map:
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 777, "as long as was asked for"
    (out / f"{parallel.rank()}.json").write_text(json.dumps(found))
    parallel.close()


@pytest.fixture(scope="module")
def alone() -> dict[str, Transformer]:
    models = {name: Transformer(config) for name, config in SHAPES.items()}
    for model in models.values():
        model.init_weights(1)
    return models


@pytest.mark.parametrize(("ranks", "tp"), [(2, 2), (4, 2)])
def test_the_same_tokens_as_one_process(
    tmp_path: Path, alone: dict[str, Transformer], ranks: int, tp: int
) -> None:
    succeed(ranks, work, tmp_path, tp, folder=tmp_path)
    for name, model in alone.items():
        whole = sum(p.numel() for p in model.parameters())
        for rank in range(ranks):
            found = json.loads((tmp_path / f"{rank}.json").read_text())[name]
            expected = drawn(model, rank, generate)
            assert [ids for ids, _ in found["answers"]] == [ids for ids, _ in expected]
            for (_, ours), (_, theirs) in zip(found["answers"], expected, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
            assert found["held"] < 0.75 * whole  # all but the embedding, and of "odd" the head
    assert sum(map(len, (prompts_of(rank) for rank in range(ranks)))) > 15


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_are_the_whole(alone: dict[str, Transformer], size: int) -> None:
    for name, whole in alone["even"].named_parameters():
        parts = [part(name, whole, Group(None, size, rank)) for rank in range(size)]
        if parts[0].shape == whole.shape:
            assert name.endswith(("norm.weight", "layernorm.weight", "embed_tokens.weight"))
            continue
        cut = next(i for i in (0, 1) if parts[0].shape[i] != whole.shape[i])
        assert torch.equal(torch.cat(parts, cut), whole)


@pytest.mark.parametrize(
    ("world", "size", "message"),
    [
        (1, 2, "there is 1 rank, no multiple of it; start more ranks with torchrun"),
        (6, 4, "there are 6 ranks, no multiple of it; take a divisor"),
        (8, 8, "sampling_tp is 8 and the model's n_kv_heads is 4, no multiple of it"),
        (3, 3, "sampling_tp is 3 and the model's n_kv_heads is 4, no multiple of it"),
    ],
)
@pytest.mark.parametrize("option", ["sampling_tp", "tp"])
def test_what_cannot_be_cut_is_found_before_loading(
    monkeypatch: pytest.MonkeyPatch, world: int, size: int, message: str, option: str
) -> None:
    monkeypatch.setattr(tensor_parallel.ranks, "world_size", lambda: world)
    source = fresh(CONFIG, 1, "lm")._replace(tensors=lambda: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=message.replace("sampling_tp", option)):
        parallel.load(source, "cpu", **{option: size})
