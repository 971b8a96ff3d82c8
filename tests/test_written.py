"""What a stage wrote and reads again is held against its note: an edited or cut file is named.

Run: python -m pytest tests/test_written.py -q
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from puna.trainers import rejection, rlhf
from puna.trainers.rejection import RejectionConfig
from puna.trainers.rl.comparisons import Verdict
from puna.trainers.rl.config import RLHFConfig
from puna.trainers.train import written


def test_a_note_tells_any_change(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("one\ntwo\n")
    written.check(tmp_path, "a.jsonl")  # never noted
    written.note(tmp_path, "a.jsonl")
    written.check(tmp_path, "a.jsonl", "none.jsonl")
    for text in ("one\ntwO\n", "one\n", "two\none\n", ""):
        file.write_text(text)
        for grows in (False, True):
            with pytest.raises(ValueError, match="a.jsonl is not what the run wrote; put that"):
                written.check(tmp_path, "a.jsonl", grows=grows)
    file.write_text("one\ntwo\nthr")  # a kill between a row and its note
    written.check(tmp_path, "a.jsonl", grows=True)
    with pytest.raises(ValueError, match="a.jsonl is not what the run wrote"):
        written.check(tmp_path, "a.jsonl")
    file.unlink()
    written.check(tmp_path, "a.jsonl")  # it is made anew
    (tmp_path / written.WRITTEN).write_text('{"a.jsonl": 3}')
    with pytest.raises(ValueError, match="written.json is damaged; remove it to trust the files"):
        written.noted(tmp_path)


def edited(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0].replace("score", "Score", 1), *lines[1:]])[:-1] + " \n")


@pytest.fixture(scope="module")
def sampled(tiny, tmp_path_factory):
    config = RejectionConfig(
        policy=tiny / "chat", helpfulness=tiny / "helpfulness", safety=tiny / "safety",
        prompts=[tiny / "prompts.jsonl"], max_new_tokens=6, samples=3, batch=8, chunk=8, epochs=3,
        save_every=1, device="cpu", out=tmp_path_factory.mktemp("sampled") / "run",
    )  # fmt: skip
    rejection.run(config)
    return config


@pytest.mark.parametrize("name", ["selected.jsonl", "pool.jsonl", "samples.jsonl"])
def test_an_edited_sample_is_not_trained_on(sampled, tmp_path, name):
    out = tmp_path / "run"
    shutil.copytree(sampled.out, out)
    (out / "finished.json").unlink()
    shutil.rmtree(out / "checkpoints")
    if name == "samples.jsonl":  # still being sampled
        (out / "selected.jsonl").unlink()
    edited(out / name)
    with pytest.raises(ValueError, match=f"{name} is not what the run wrote"):
        rejection.run(replace(sampled, out=out))
    (out / name).unlink()
    if name == "pool.jsonl":
        (out / "selected.jsonl").unlink()
    assert rejection.run(replace(sampled, out=out)) == out / "model"


def test_a_finished_runs_model_is_that_of_the_run(sampled, tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(sampled.out, out)
    shutil.copy(tiny / "lm" / "model.safetensors", out / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is not what the run wrote"):
        rejection.run(replace(sampled, out=out))


def test_changed_annotations_are_named(tiny, tmp_path):
    prompts = [tiny / "prompts.jsonl"]
    config = RLHFConfig(
        out=tmp_path / "loop", model=tiny / "chat", prompts=prompts, helpfulness_prompts=prompts,
        safety_prompts=prompts, versions=1, ppo_versions=0, helpfulness_pairs=12, safety_pairs=12,
        max_new_tokens=6, reward={"batch": 4}, rejection={"samples": 2, "batch": 4}, device="cpu",
    )  # fmt: skip
    ask = {
        kind: lambda a, b, safety=safety: [Verdict(0, "better", safety)] * len(a)
        for kind, safety in (("helpfulness", None), ("safety", "both_safe"))
    }
    rlhf.run(config, ask)
    file = config.out / "round-1" / "helpfulness.jsonl"
    rows = [json.loads(row) for row in file.open()]
    rows[0]["chosen"], rows[0]["rejected"] = rows[0]["rejected"], rows[0]["chosen"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "round-1/helpfulness.jsonl is not what the run has learned from; put the former .* --out"
    with pytest.raises(ValueError, match=said):
        rlhf.run(config, ask)


def test_an_amendment_that_changes_nothing_says_so(sampled, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(sampled.out, out)
    rejection.run(replace(sampled, out=out, temperature=0.5, epochs=4, amend=True))
    said = capsys.readouterr().out
    assert f"{out}: 'temperature' changed nothing: the answers are drawn" in said


def test_samples_of_other_prompts_are_refused(sampled, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(sampled.out, out)
    for name in ("finished.json", "selected.jsonl"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints")
    rows = sampled.prompts[0].read_text().splitlines(keepends=True)
    (tmp_path / "others.jsonl").write_text("".join(reversed(rows)))
    others = replace(sampled, out=out, prompts=[tmp_path / "others.jsonl"], amend=True)
    with pytest.raises(
        ValueError, match="samples.jsonl:1: an answer to another prompt than prompt 1"
    ):
        rejection.run(others)
    assert rejection.run(replace(sampled, out=out)) == out / "model"  # the amendment is taken back
