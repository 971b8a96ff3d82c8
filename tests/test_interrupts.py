"""Ctrl-C ends what was asked for, not a part of it. Run: pytest tests/test_interrupts.py -q"""

import signal
from dataclasses import replace

import pytest
from test_gatt import configured as ghostly
from test_loop import STEPS, batches, configured, metrics, same_weights, train
from test_rlhf import ANNOTATORS, files
from test_rlhf import configured as looped

from puna.core.checkpoint.folder import load_model
from puna.trainers import gatt, ppo, rlhf
from puna.trainers.evaluation import chat
from puna.trainers.evaluation.config import EvaluateChatConfig
from puna.trainers.rl import rollout
from puna.trainers.train import loop
from puna.trainers.train.claim import is_finished
from puna.trainers.train.command import command
from puna.trainers.train.interrupts import stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_in_the_last_step_is_answered_when_the_model_is_written(tmp_path, number):
    def stopped(step):
        if step == STEPS - 1:
            signal.raise_signal(number)
        return batches(step)

    with pytest.raises(SystemExit, match=f"stopped when {tmp_path} was done; the same command"):
        train(configured(tmp_path), stopped)
    assert is_finished(tmp_path) and load_model(tmp_path / "model")
    whole = train(configured(tmp_path / "whole"))
    assert same_weights(tmp_path / "model", whole)
    assert metrics(tmp_path) == metrics(tmp_path / "whole")


def test_a_stop_while_the_last_model_is_written_waits_for_it(tmp_path, monkeypatch):
    write = loop.Run.finish

    def interrupted(run, model):
        signal.raise_signal(signal.SIGINT)
        return write(run, model)

    monkeypatch.setattr(loop.Run, "finish", interrupted)
    with pytest.raises(SystemExit, match="stopped when .* was done"):
        train(configured(tmp_path))
    assert is_finished(tmp_path)


def test_handlers_are_as_before_and_nothing_is_left_over(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit), stop_requests(tmp_path):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with stop_requests(tmp_path) as stop:
        assert not stop()
    with pytest.raises(ValueError, match="ours"), stop_requests(tmp_path):
        signal.raise_signal(signal.SIGINT)
        raise ValueError("ours")  # what went wrong is said, not that it was stopped besides


def test_a_loop_does_not_begin_its_next_stage_and_goes_on_to_the_same_end(
    tiny, tmp_path, monkeypatch
):
    """Ctrl-C in the last step of each kind of stage, one after the other."""
    options = {"versions": 1, "helpfulness_pairs": 16, "safety_pairs": 16}
    rlhf.run(looped(tiny, tmp_path / "whole", **options), ANNOTATORS)
    out = tmp_path / "run"
    stages = [out / "round-1" / name for name in ("helpfulness", "safety", "rejection", "ppo")]
    finish = loop.Run.finish

    def interrupted(run, model):
        signal.raise_signal(signal.SIGINT)
        return finish(run, model)

    monkeypatch.setattr(loop.Run, "finish", interrupted)
    assert ppo.Run is loop.Run
    for number, stage in enumerate(stages):
        with pytest.raises(SystemExit, match=f"stopped when {stage} was done"):
            rlhf.run(looped(tiny, out, **options), ANNOTATORS)
        assert [each.exists() for each in stages] == [place <= number for place in range(4)]
    rlhf.run(looped(tiny, out, **options), ANNOTATORS)
    assert files(out) == files(tmp_path / "whole")


def test_where_nobody_asks_whether_to_stop_ctrl_c_acts_at_once_and_says_how_to_go_on(
    tiny, tmp_path, monkeypatch, capsys
):
    """Between two stages, while people are waited for, while answers are scored."""

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(rlhf, "accuracy_of", interrupted)
    work = lambda config: rlhf.run(looped(tiny, tmp_path / "run"), ANNOTATORS)  # noqa: E731
    arguments = [f"--{name}={tiny / 'chat'}" for name in ("model", "prompts", "out")]
    assert command("puna rlhf", rlhf.RLHFConfig, work, arguments) == 130
    assert capsys.readouterr().err == (
        f"puna rlhf: interrupted; the same command continues {tmp_path / 'run'}\n"
    )


@pytest.fixture
def ctrl_c_in_draw(monkeypatch):
    """Call with a number: Ctrl-C comes while so many-th answers are drawn, counted from 1."""
    real, drawn = rollout.draw_answers, []

    def at(number: int) -> None:
        def interrupted(*args, **options):
            drawn.append(1)
            if len(drawn) == number:
                signal.raise_signal(signal.SIGINT)
            return real(*args, **options)

        drawn.clear()
        monkeypatch.setattr(rollout, "draw_answers", interrupted)

    return at


def test_ghost_attention_stops_inside_a_turn(tiny, tmp_path, ctrl_c_in_draw):
    """Eight dialogues, three answers at a time: the second of turn 2, the last of it, the last."""
    out, options = tmp_path / "run", {"chunk": 3, "samples": 2}
    gatt.run(ghostly(tiny, tmp_path / "whole", samples=2))  # all of a turn at once
    for number, turns in ((8, 1), (6, 2), (6, 4)):
        ctrl_c_in_draw(number)
        with pytest.raises(SystemExit, match=f"after {turns} of 4 turns; the same .* {out}"):
            gatt.run(ghostly(tiny, out, **options))
        file = out / "samples" / "turns.jsonl"
        assert file.read_text().count("\n") == turns
    gatt.run(ghostly(tiny, out, **options))
    for name in ("samples/turns.jsonl", "metrics.jsonl"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_an_evaluation_stops_inside_a_turn(tiny, tmp_path, ctrl_c_in_draw):
    config = EvaluateChatConfig(
        out=tmp_path / "run",
        model=[tiny / "chat"],
        dialogues=[tiny / "ghosts.jsonl"],
        max_new_tokens=10,
        chunk=3,
        device="cpu",
    )
    keeps = lambda answers: [len(answer.text) % 2 == 0 for answer in answers]  # noqa: E731
    for number, turns in ((2, 0), (3, 1)):
        ctrl_c_in_draw(number)
        with pytest.raises(SystemExit, match=f"stopped after turn {turns}; the same command"):
            chat.run(config, keeps=keeps)
    found = chat.run(config, keeps=keeps)["instruction_kept"]
    whole = chat.run(replace(config, out=tmp_path / "whole", chunk=64), keeps=keeps)
    assert found == whole["instruction_kept"]
