"""Checkpoints that several ranks write, behind the training, and that any number of ranks reads.

Ranks are started by `campaign.kills.starter`; each runs `work` of this file.
"""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from campaign.kills import finish, kill, starter
from safetensors.torch import load_file, save_file
from test_parallel import CONFIG, ROWS, TOKENS, loss_sum
from torch import Tensor
from torch.distributed.tensor import DTensor

from puna.core import parallel
from puna.core.checkpoint import pieces, shards
from puna.core.checkpoint.folder import load_model, open_model
from puna.core.checkpoint.hashes import write_hashes
from puna.core.checkpoint.source import fresh
from puna.core.model import Transformer
from puna.trainers.capacity import phases
from puna.trainers.train import run as run_module
from puna.trainers.train import saving
from puna.trainers.train.loop import TrainConfig
from puna.trainers.train.run import PROOF, Run, Trained, open_run
from puna.trainers.train.state import State

HEADS = {"model": "lm", "critic": "score"}  # of a score head all but one rank hold nothing
STEPS, SAVES = 8, [3, 5]


def networks(run: Run) -> dict[str, Trained]:
    """Both, from the run's newest checkpoint or fresh."""
    found = {}
    for name, head in HEADS.items():
        source = fresh(CONFIG, 0, head)
        if run.checkpoint is not None:
            source = open_model(run.weights(Path("none"), None if name == "model" else name))
        model = parallel.load(source, "cpu")
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1, fused=True)
        found[name] = Trained(model, optimizer)
    run.restore_optimizers(found)
    return found


def whole(networks: dict[str, Trained]) -> dict[str, Tensor]:
    """Weights and optimizer states, gathered by PyTorch."""
    found = {}
    for network, (model, optimizer) in networks.items():
        for name, parameter in model.named_parameters():
            values = {"weight": parameter.detach(), **optimizer.state.get(parameter, {})}
            for key, value in values.items():
                tensor = value.full_tensor() if isinstance(value, DTensor) else value
                found[f"{network} {name} {key}"] = tensor.contiguous().clone()
    return found


def train(network: Trained, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, TOKENS + 1), generator=generator)
    mine = tokens.chunk(parallel.world_size())[parallel.rank()]
    loss = loss_sum(network.model, mine) / (ROWS * TOKENS)
    loss.backward()
    parallel.clip_gradients(network.model, 0.5)
    network.optimizer.step()
    network.optimizer.zero_grad()
    return float(parallel.all_sum(loss.detach()))


def work(out: str, last: int, saves: list[int], harm: str = "") -> None:
    """Go on with the run `out` to step `last`; rank 0 notes beside it what it began with, what it
    ended with and the losses, each rank what went wrong."""
    torch.set_num_threads(1)
    parallel.init()
    shards.SMALL = 2000  # bytes: each rank has a file of the model to write
    path = Path(out)
    HARMS.get(harm, lambda path: None)(path)
    try:
        with open_run(TrainConfig(out=path, device="cpu"), tokenizer=None) as run:
            trained = networks(run)
            begin, losses = whole(trained), []
            for step in range(run.resume_step(), last):
                losses.append([train(network, step) for network in trained.values()])
                run.log(step + 1, loss=losses[-1][0])
                if step + 1 in saves:
                    run.save(step + 1, trained, keep=2)
            end = whole(trained)
        if parallel.is_main():
            save_file(begin, f"{out}-begin.safetensors")
            save_file(end, f"{out}-end.safetensors")
            Path(f"{out}-losses.json").write_text(json.dumps(losses))
    except ValueError as error:
        Path(f"{out}-error-{parallel.rank()}").write_text(str(error))
    parallel.close()


def hang(path: Path) -> None:
    """Say that the moment to kill has come, and wait for it."""
    path.with_name("now").touch()
    time.sleep(1000)


def torn_file(path: Path) -> None:
    """Rank 1 stops in the middle of a file of step 5."""
    write = saving.save_tensors

    def torn(tensors: dict[str, Tensor], file: Path, **options) -> None:
        write(tensors, file, **options)
        if parallel.rank() == 1 and "step-000005" in str(file):
            os.truncate(file, file.stat().st_size // 2)
            hang(path)

    saving.save_tensors = torn


def before_the_rename(path: Path) -> None:
    """Rank 0 stops when all is written and step 5 has not its name yet."""
    write = run_module.finish_checkpoint

    def whole_but_hidden(folder: Path, state: State, *arguments) -> None:
        write(folder, state, *arguments)
        if state.step == 5:
            hang(path)

    run_module.finish_checkpoint = whole_but_hidden


def after_the_rename(path: Path) -> None:
    """Rank 0 stops as soon as step 5 stands."""
    written = Run._written

    def stands(run: Run, step: int, keep: int) -> None:
        if step == 5 and parallel.is_main():
            hang(path)
        written(run, step, keep)

    Run._written = stands


def full_disk(path: Path) -> None:
    """Rank 1 has no room for step 5."""
    write = saving.save_tensors

    def full(tensors: dict[str, Tensor], file: Path, **options) -> None:
        if parallel.rank() == 1 and "step-000005" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, file, **options)

    saving.save_tensors = full


HARMS = {each.__name__: each for each in (torn_file, before_the_rename, after_the_rename)}
HARMS["full_disk"] = full_disk


def code(out: Path, last: int = STEPS, saves: list[int] = SAVES, harm: str = "") -> str:
    here = str(Path(__file__).parent)
    return (
        f"import sys; sys.path.insert(0, {here!r}); from test_saving import work; "
        f"work({str(out)!r}, {last}, {saves}, {harm!r})"
    )


@pytest.fixture(scope="module")
def start():
    return starter()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, start) -> Path:
    """Runs of one and of two ranks: `whole-N` went through, `half-N` ended at its checkpoint."""
    root = tmp_path_factory.mktemp("made")
    for ranks in (1, 2):
        finish(start(code(root / f"whole-{ranks}"), ranks))
        finish(start(code(root / f"half-{ranks}", last=3, saves=[3]), ranks))
    return root


def checkpoint(run: Path, step: int = 3) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def noted(run: Path, when: str) -> dict[str, Tensor]:
    return load_file(f"{run}-{when}.safetensors")


def losses(run: Path) -> list[list[float]]:
    return json.loads(Path(f"{run}-losses.json").read_text())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 2), (2, 4), (1, 2)])
def test_another_number_of_ranks_goes_on(made, tmp_path, start, before: int, after: int):
    """With what was saved, to the bit; then as if nothing had been, on as many ranks to the bit."""
    out = tmp_path / "run"
    shutil.copytree(made / f"half-{before}", out)
    finish(start(code(out), after))
    assert_equal(noted(out, "begin"), noted(made / f"half-{before}", "end"))
    expected = made / f"whole-{before}"
    if before == after:
        assert losses(out) == losses(expected)[3:]
        assert_equal(noted(out, "end"), noted(expected, "end"))
    torch.testing.assert_close(losses(out), losses(expected)[3:], atol=2e-6, rtol=2e-6)
    for name, tensor in noted(expected, "end").items():
        torch.testing.assert_close(noted(out, "end")[name], tensor, atol=1e-4, rtol=1e-5)


def test_every_rank_writes_its_part(made):
    """The optimizer's state in equal parts, the model as a folder that anybody opens."""
    folder = checkpoint(made / "half-2")
    for name, head in HEADS.items():
        sizes = [
            file.stat().st_size
            for file in (folder / "training" / f"{name}-optimizer").glob("*.safetensors")
        ]
        assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)
        model = load_model(folder if name == "model" else folder / "training" / name, head=head)
        for parameter, value in model.named_parameters():
            saved = noted(made / "half-2", "end")[f"{name} {parameter} weight"]
            assert torch.equal(value, saved), parameter
    pairs = zip(
        sorted(folder.glob("model-*-of-00002.safetensors")),
        sorted((folder / "training" / "model-optimizer").iterdir()),
        strict=True,
    )
    written = [model.stat().st_size + state.stat().st_size for model, state in pairs]
    assert written == pytest.approx([phases.host("sft", CONFIG, 2)] * 2, rel=0.25)  # and headers
    assert not list(folder.rglob(".*")) and not list(folder.rglob("*.distcp"))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_pytorchs_own_reader_finds_the_same(made):
    saved = noted(made / "half-2", "end")
    expected = {
        ".".join(name.split()[1:]): tensor
        for name, tensor in saved.items()
        if name.startswith("model ") and not name.endswith(" weight")
    }
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    folder = checkpoint(made / "half-2") / "training" / "model-optimizer"
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    assert_equal(found, expected)


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_or_the_new(made, tmp_path, start):
    out = tmp_path / "run"
    for harm, there in (
        ("torn_file", [3]), ("before_the_rename", [3]), ("after_the_rename", [3, 5]),
    ):  # fmt: skip
        processes = start(code(out, harm=harm), 2)
        until(lambda: (tmp_path / "now").exists(), processes)
        kill(processes)
        (tmp_path / "now").unlink()
        assert steps(out) == there
    finish(start(code(out), 2))
    assert losses(out) == losses(made / "whole-2")[5:]
    assert_equal(noted(out, "end"), noted(made / "whole-2", "end"))
    rows = [json.loads(row)["loss"] for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == [row[0] for row in losses(made / "whole-2")]


def until(there, processes) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert time.monotonic() < deadline and all(each.is_alive() for each in processes)
        time.sleep(0.01)


def steps(out: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((out / "checkpoints").glob("step-*"))]


def test_a_write_that_fails_is_said_at_the_next(tmp_path, start):
    out = tmp_path / "run"
    finish(start(code(out, saves=[3, 5, 7], harm="full_disk"), 2))
    for rank in (0, 1):
        said = Path(f"{out}-error-{rank}").read_text()
        assert said.startswith("the disk is full: ") and "step-000005 was not written" in said
        assert said.endswith("(rank 1)") and "\n" not in said
    assert steps(out) == [3]
    assert not list((out / "checkpoints").glob(".*"))


SECOND = "training/model-optimizer/shard-00002-of-00002.safetensors"


@pytest.mark.parametrize("missing", [True, False])
def test_a_shard_at_fault_is_named_before_anything_is_loaded(made, tmp_path, missing):
    out = tmp_path / "run"
    shutil.copytree(made / "half-2", out)
    file = checkpoint(out) / SECOND
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink() if missing else file.write_bytes(data)
    why = "is missing" if missing else "is not what was written"
    with (
        pytest.raises(ValueError, match=rf"step-000003 is damaged \({SECOND} {why}\)"),
        open_run(TrainConfig(out=out), tokenizer=None),
    ):
        raise AssertionError("not reached")


def test_pieces_that_are_not_all_there_are_refused(made, tmp_path):
    """Also where the hashes say that all is well."""
    out = tmp_path / "run"
    shutil.copytree(made / "half-2", out)
    (checkpoint(out) / SECOND).unlink()
    (checkpoint(out) / PROOF).unlink()
    write_hashes(checkpoint(out), PROOF)
    with (
        pytest.raises(ValueError, match="where the model's is"),
        open_run(TrainConfig(out=out), tokenizer=None) as run,
    ):
        networks(run)


def finished(out: str, dtype: str) -> None:
    """A run that ends with a model written in `dtype`, in files that only the group may read."""
    os.umask(0o027)
    parallel.init()
    shards.SMALL = 2000  # bytes: several files
    with open_run(TrainConfig(out=Path(out), model_dtype=dtype), tokenizer=None) as run:
        trained = networks(run)
        train(trained["model"], 0)
        end = whole({"model": trained["model"]})
        run.finish(trained["model"].model)
    if parallel.is_main():
        save_file(end, f"{out}-end.safetensors")
    parallel.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_finished_model_is_written_in_the_dtype_asked_for(ranks, tmp_path, start):
    """And transformers opens it in that dtype, with the trained weights, rounded once."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); from test_saving import finished; "
    finish(start(f"{code}finished({str(out)!r}, 'bf16')", ranks))
    files = list((out / "model").iterdir())
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
    assert (out / "model" / "model.safetensors.index.json").exists() == (ranks > 1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    found = dict(theirs.named_parameters())
    assert {parameter.dtype for parameter in found.values()} == {torch.bfloat16}
    for name, tensor in noted(out, "end").items():
        _, parameter, kind = name.split()
        assert kind != "weight" or torch.equal(found[parameter], tensor.to(torch.bfloat16)), name


class Asked:
    """A tensor that notes how many of its numbers somebody takes."""

    def __init__(self, tensor: Tensor, asked: list[int]):
        self.tensor, self.asked, self.shape = tensor, asked, tensor.shape

    def __getitem__(self, block: pieces.Block) -> Tensor:
        self.asked.append(self.tensor[block].numel())
        return self.tensor[block]


def slices(out: str) -> None:
    """What a rank takes of a source's tensors."""
    parallel.init()
    source, asked = fresh(CONFIG, 0), []
    watched = source._replace(tensors=lambda: ((n, Asked(t, asked)) for n, t in source.tensors()))
    model = parallel.load(watched, "cpu")
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    Path(f"{out}-{parallel.rank()}").write_text(json.dumps([held, sum(asked)]))
    parallel.close()


def test_a_rank_reads_its_part_of_the_weights(tmp_path, start):
    here = str(Path(__file__).parent)
    run = f"import sys; sys.path.insert(0, {here!r}); from test_saving import slices; "
    finish(start(f"{run}slices({str(tmp_path / 'read')!r})", 2))
    found = [json.loads((tmp_path / f"read-{rank}").read_text()) for rank in (0, 1)]
    assert all(held == read for held, read in found)
    all_of_it = sum(parameter.numel() for parameter in Transformer(CONFIG).parameters())
    assert sum(held for held, _ in found) == all_of_it
