"""The suite on a tiny shape: what it prints, and that it refuses to time wrong results."""

import json

import pytest
import torch

from puna.benchmarks import machine, output, readme, rows, suite, timing
from puna.benchmarks.models import chat, contexts, decode, generate, rlhf, rollout, steps, train
from puna.benchmarks.models import shapes as models
from puna.benchmarks.models.generate import PUNA
from puna.benchmarks.models.shapes import Shape, multiplied_parameters, open_models
from puna.cli.bench import ModelBenchConfig, measure
from puna.core.config import SIZES, ModelConfig, parameter_count
from puna.core.native.loader import extension

CPU = torch.device("cpu")
TINY = ModelConfig(64, 2, 4, 2, 96, 128, context=64)


@pytest.fixture
def tiny(monkeypatch):
    """A shape called "tiny" takes the place of the suite's, with short answers and rows."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(suite, "SHAPES", ("tiny",))
    monkeypatch.setattr(train, "BATCH", {"tiny": 2})
    monkeypatch.setattr(train, "TOKENS", 32)
    monkeypatch.setattr(train, "fresh_peak_mb", lambda provider, *_: float(len(provider)))
    monkeypatch.setattr(steps, "compiles", lambda device: False)
    monkeypatch.setattr(generate, "PROMPT", 4)
    monkeypatch.setattr(generate, "NEW", 8)
    monkeypatch.setattr(decode, "NEW", 8)
    for module in (chat, contexts, decode):
        monkeypatch.setattr(module, "llama_cpp_installed", lambda: False)
    monkeypatch.setattr(contexts, "BEHIND", 4)
    monkeypatch.setattr(suite, "LENGTHS", (12,))
    monkeypatch.setattr(suite, "DECODE_BATCHES", (1, 3))
    monkeypatch.setattr(suite, "BATCHES", (1, 3))
    monkeypatch.setattr(rlhf, "CPU", rlhf.DRY)
    monkeypatch.setattr(suite, "bench_fsdp", lambda *_, **__: iter([[]]))  # processes know no tiny
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)


def test_the_last_line_is_the_document(tiny, capsys, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(output, "RESULTS", tmp_path)
    suite.run_suite("all", suite.Setting(CPU, rounds=2), command="puna bench", save=True)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    work = [(row["bench"], row["batch"], row["provider"], row["dtype"]) for row in document["rows"]]
    rounded = [] if extension() is None else ["bf16", "int8"]
    assert work == [
        ("generate", 1, "puna", "fp32"),
        ("generate", 1, "transformers", "fp32"),
        ("generate", 3, "puna", "fp32"),
        ("generate", 3, "transformers", "fp32"),
        ("decode", 1, "puna", "fp32"),
        *(("decode", 1, "puna", dtype) for dtype in rounded),
        ("decode", 3, "puna", "fp32"),
        *(("decode", 3, "puna", dtype) for dtype in rounded),
        *(
            (bench, 1, "puna", dtype)
            for bench in ("prefill", "context", "chat")
            for dtype in ("fp32", *rounded)
        ),
        ("chat", 1, "puna", "fp32"),  # all run again in every turn
        *[("rlhf", 4, "puna", "fp32")] * 5,
        ("train", 2, "puna", "fp32"),
        ("train", 2, "transformers", "fp32"),
    ]
    for row in document["rows"]:
        assert 0 < row["p20"] <= row["value"] <= row["p80"]
        assert row["limit"] > 0
        assert row["unit"] == "tok/s" and row["shape"] == "tiny"
        if row["bench"] == "train":
            assert row["peak_mb"] == len(row["provider"])  # of a fresh process each
    (written,) = tmp_path.rglob("all.json")
    assert json.loads(written.read_text()) == document
    assert written.parent.name == machine.slug(document["machine"])


def test_without_transformers_its_rows_are_left_out_and_this_is_said(tiny, capsys, monkeypatch):
    monkeypatch.setattr(models, "installed", lambda package: None)
    monkeypatch.setattr(machine, "installed", lambda package: None)
    document = suite.run_suite("train", suite.Setting(CPU, rounds=1), command="puna bench train")
    assert [row["provider"] for row in document["rows"]] == ["puna"]
    assert "its rows are left out" in capsys.readouterr().out


def test_nothing_is_timed_when_losses_differ():
    steps = {"puna": lambda: 2.0, "other": lambda: 2.001}
    with pytest.raises(RuntimeError, match="nothing was timed: other trains to other losses"):
        train.verify(steps, 1e-4)


def test_nothing_is_timed_when_a_loss_is_not_a_number():
    with pytest.raises(RuntimeError, match="nothing was timed"):
        train.verify({"puna": lambda: 2.0, "other": lambda: float("nan")}, 1e-4)


def test_nothing_is_timed_when_tokens_differ(tiny, tmp_path):
    opened = open_models(Shape("tiny"), tmp_path / "model", CPU)
    prompts = torch.tensor([[5, 6, 7, 8]])
    ours = generate.puna_answer(opened, prompts)()
    wrong = [[*ours[0][:3], (ours[0][3] + 1) % TINY.vocab_size, *ours[0][4:]]]
    other = ("other", "fp32")
    assert generate.verify(opened, prompts, {PUNA: ours, other: ours})[other] == 0
    with pytest.raises(RuntimeError, match=r"other fp32 wrote token .* \(place 3, logits"):
        generate.verify(opened, prompts, {PUNA: ours, other: wrong})


def test_the_limit_is_that_of_the_rows_that_ran_at_once(tiny, tmp_path, monkeypatch, capsys):
    """Room for two rows of twelve tokens: five are three steps of the weights, not one."""
    opened = open_models(Shape("tiny"), tmp_path / "model", CPU, peers=False)
    a_token, held = 2 * TINY.n_layers * TINY.n_kv_heads * TINY.head_dim * 4, []
    monkeypatch.setattr(generate, "room", lambda *_: 12 * a_token * 2 + 1)

    def noted(*args, before=generate.generate, **options):
        held.append(options["cache_bytes"])
        return before(*args, **options)

    monkeypatch.setattr(generate, "generate", noted)
    (row,) = generate.bench_generate(opened, 5, 1)
    at_two = generate.limit(TINY, opened.ceilings, 2, generate.PROMPT + 4)
    assert row["limit"] == pytest.approx(at_two) and row["batch"] == 5
    assert set(held) == {12 * a_token * 2 + 1}
    assert "of 5 rows 2 at once" in capsys.readouterr().out
    for row in rollout.bench_rollout(opened, 1, 3):
        assert row["batch"] == 1  # each slot has room for the longest answer


def test_a_near_tie_is_no_mistake(tiny, tmp_path):
    opened = open_models(Shape("tiny"), tmp_path / "model", CPU)
    head = opened.puna.lm_head.weight
    prompts = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        best = generate.puna_answer(opened, prompts)()[0][0]
        twin = (best + 1) % TINY.vocab_size
        head[twin] = head[best]  # two tokens with the same logit
    ours = generate.puna_answer(opened, prompts)()
    first = ours[0][0]
    theirs = [[twin if first == best else best, *ours[0][1:]]]
    errors = generate.verify(opened, prompts, {PUNA: ours, ("other", "fp32"): theirs})
    assert errors == {PUNA: 0.0, ("other", "fp32"): 1.0}


@pytest.mark.parametrize("shape", ["15m", "demo", "70b"])
def test_multiplied_parameters(shape):
    config = SIZES[shape]
    norms = (2 * config.n_layers + 1) * config.dim
    embedding = config.vocab_size * config.dim
    assert multiplied_parameters(config) == parameter_count(config) - norms - embedding


def test_a_rate_above_its_limit_is_no_share_and_is_named():
    work = rows.Work("generate", "demo", 1, tokens=100, limit=100.0)
    fast, right = (rows.row(work, "puna", timing.summarise([t]), 0.0, None) for t in (0.5, 0.95))
    assert [cells[8] for cells in output.row_cells([fast, right])] == ["above", "105%"]
    (line,) = output.above_limit([fast, right])
    assert line.startswith("above its limit, so do not trust it: generate demo 1 fp32 puna")


def test_rounds_are_interleaved():
    calls: list[str] = []
    work = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = timing.interleaved(work, rounds=3, device=CPU)
    # One unmeasured round, then three; every other one backwards.
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert set(found) == {"a", "b"}


def test_summary_of_seconds():
    assert timing.summarise([4.0]) == timing.Timing(4.0, 4.0, 4.0)
    assert timing.summarise([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == timing.Timing(3.5, 2.0, 5.0)


def test_peak_memory_is_what_one_call_needs():
    size = 64_000_000
    peak = timing.peak_mb(lambda: torch.ones(size // 4).sum(), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert size / 1e6 * 0.9 < peak < size / 1e6 * 1.5


def test_slug_names_a_folder():
    card = {"processor": "AMD EPYC 9R14 (96-Core)", "threads": 2}
    assert machine.slug(card) == "amd-epyc-9r14-96-core-2-threads"


def test_settings_that_cannot_be_measured():
    with pytest.raises(ValueError, match="rounds is -1; it cannot be negative"):
        measure(ModelBenchConfig(rounds=-1), "all")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="ask for cpu or auto"):
            measure(ModelBenchConfig(device="cuda"), "all")


def test_rollouts_beside_pytorchs(tiny, monkeypatch, tmp_path, capsys):
    if extension() is None:
        pytest.skip("the native extension is not built")
    for name, value in (("PROMPTS", 7), ("SLOTS", 3), ("MEAN", 4)):
        monkeypatch.setattr(rollout, name, value)
    monkeypatch.setattr(rollout, "PROMPT", 4)
    rows = rollout.bench_rollout(open_models(Shape("tiny"), tmp_path, CPU), rounds=1)
    lengths = rollout.answer_lengths(7, TINY.context - 4, 4)
    assert [row["provider"] for row in rows] == ["puna", "puna-no-refill", "puna-pytorch"]
    assert all(row["value"] > 0 and row["batch"] == 3 for row in rows)
    batches = [lengths[:3], lengths[3:6], lengths[6:]]
    ideal = sum(max(batch) for batch in batches) * 3 / sum(lengths)
    assert f"at best win {ideal:.1f} times" in capsys.readouterr().out


def test_the_readme_shows_the_committed_results():
    written = readme.README.read_text(encoding="utf-8")
    assert readme.page(written) == written
