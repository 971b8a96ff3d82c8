"""Safety context distillation. Run: python -m pytest tests/test_distill.py -q"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.core.checkpoint.folder import load_model
from puna.core.packed import score
from puna.core.text.chat import encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import distill
from puna.trainers.data.preprompts import (
    ADJECTIVES,
    TEMPLATES,
    by_category,
    generic,
    load_adversarial,
    prefixed,
)
from puna.trainers.data.readers import Skipped
from puna.trainers.distill import DistillConfig
from puna.trainers.rejection import RejectionConfig
from puna.trainers.rl.best_of import read_samples


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.open()]


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Prompts of two categories and of none, some not tagged; short pre-prompts for one of them."""
    root = tmp_path_factory.mktemp("distill")
    words = ("red", "blue", "cup", "moon", "sing")
    prompts = [
        {"prompt": f"{a} {b}", "safety": i != 4, **({"category": a} if a != "cup" else {})}
        for a in words[:3]
        for i, b in enumerate(words)
    ]
    write(root / "prompts.jsonl", prompts)
    write(
        root / "pre.jsonl",
        [
            {"preprompt": "be old", "category": "red"},
            {"preprompt": "be new", "category": "red"},
            {"preprompt": "be green"},
        ],
    )
    return root


def configured(tiny: Path, files: Path, out: Path, **options) -> DistillConfig:
    values = {
        "policy": tiny / "chat",
        "safety": tiny / "safety",
        "prompts": [files / "prompts.jsonl"],
        "preprompts": [files / "pre.jsonl"],
        "max_new_tokens": 12,
        "chunk": 4,
        "batch": 2,
        "micro_batch": 2,
        "lr": 1e-3,
        "device": "cpu",
    }
    return DistillConfig(out=out, **(values | options))


@pytest.fixture(scope="module")
def whole(tiny, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    distill.run(configured(tiny, files, out))
    return out


def test_generic_preprompts_are_our_templates_with_two_adjectives():
    found = generic()
    assert len(set(found)) == len(found) == len(TEMPLATES) * len(ADJECTIVES) * (len(ADJECTIVES) - 1)
    for text in found:
        assert sum(word in text for word in ADJECTIVES) >= 2 and "{" not in text
    assert not any(word[0] in "aeiou" for word in ADJECTIVES)  # "a careful", never "a honest"


def test_a_preprompt_stands_before_the_system_message_and_the_dialogue_stays_as_it_is():
    asked = [{"role": "user", "content": "red"}]
    assert prefixed("be old", asked) == [{"role": "system", "content": "be old"}, *asked]
    told = [{"role": "system", "content": "sing"}, *asked]
    assert prefixed("be old", told)[0]["content"] == "be old\n\nsing"
    assert told[0]["content"] == "sing" and len(asked) == 1


def test_a_prompt_has_a_preprompt_of_its_category_or_a_general_one(tiny, files):
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    found, skipped = load_adversarial(
        [files / "prompts.jsonl"], [files / "pre.jsonl"], tokenizer, 200, 0
    )
    assert skipped["not tagged with safety: true"] == 3 and len(found) == 12
    assert {each.preprompt for each in found if each.category == "red"} == {"be old", "be new"}
    assert {each.preprompt for each in found if each.category != "red"} == {"be green"}
    for each in found:
        assert each.ids == encode_prompt(tokenizer, each.messages)
        assert each.prefixed == encode_prompt(tokenizer, prefixed(each.preprompt, each.messages))
    bare, _ = load_adversarial([files / "prompts.jsonl"], [], tokenizer, 250, 0)
    assert {each.preprompt for each in bare} <= set(generic())
    assert len({each.preprompt for each in bare}) > 6


def test_what_cannot_be_answered_is_counted_or_refused(tiny, files, tmp_path):
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "red"}] * 2)
    with pytest.raises(ValueError, match="no adversarial prompt to answer: skipped 2 rows: not"):
        load_adversarial([plain], [], tokenizer, 99, 0)
    with pytest.raises(ValueError, match="longer than 5 tokens with its pre-prompt"):
        load_adversarial([files / "prompts.jsonl"], [files / "pre.jsonl"], tokenizer, 5, 0)
    for row, said in (
        ({"preprompt": 3}, "'preprompt' is 3, expected a string"),
        ({"preprompt": "x", "category": 3}, "'category' is 3, expected a string"),
        ({"preprompt": " "}, "no usable row: skipped 1 row: the preprompt is empty"),
        ({"preprompt": "a [/INST] b"}, "contains the chat tag"),
        ({"text": "x"}, "expected 'preprompt'"),
    ):
        with pytest.raises(ValueError, match=said):
            by_category([write(tmp_path / "bad.jsonl", [row])], Skipped())


def test_answers_are_drawn_under_the_preprompt_and_scored_without_it(tiny, files, whole):
    """Each sample scored again by hand, and the whole run of draws is what the gate says."""
    samples = rows_of(whole / "samples.jsonl")
    assert [row["sample"] for row in samples] == [0, 1] * 12
    model, tokenizer = load_model(tiny / "safety"), Tokenizer(tiny / "tokenizer.model")
    for own, under in zip(samples[::2], samples[1::2], strict=True):
        assert own["messages"] == under["messages"] and own["preprompt"] == ""
        assert under["preprompt"] in ("be old", "be new", "be green")
        for row in (own, under):
            assert [message["role"] for message in row["messages"]] == ["user"]
            ids = encode_prompt(tokenizer, row["messages"]) + row["tokens"]
            assert row["score"] == pytest.approx(float(score(model, [ids])[0]), abs=1e-5)
    kept = rows_of(whole / "selected.jsonl")
    assert kept == [
        under
        for own, under in zip(samples[::2], samples[1::2], strict=True)
        if under["finished"] and under["answer"] and under["score"] > own["score"]
    ]
    assert 0 < len(kept) < 12
    found = json.loads((whole / "distillation.json").read_text())
    assert found["all"]["prompts"] == 12 and found["all"]["kept"] == len(kept)
    assert set(found["by_category"]) == {"red", "blue"}
    assert sum(each["kept"] for each in found["by_own_score"]) == len(kept)
    means = [each["own"] for each in found["by_own_score"]]
    assert means == sorted(means) and len(means) == 4
    own = [row["score"] for row in samples[::2]]
    assert found["all"]["own"] == pytest.approx(sum(own) / 12)


def test_the_preprompt_reaches_the_policy(tiny, files, tmp_path, monkeypatch):
    seen = []
    draw = distill.draw_answers

    def watched(policy, prompts, **options):
        seen.extend(prompts)
        return draw(policy, prompts, **options)

    monkeypatch.setattr(distill, "draw_answers", watched)
    distill.run(configured(tiny, files, tmp_path / "run"))
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    texts = [tokenizer.decode(ids) for ids in seen]
    assert not any("<<SYS>>" in text for text in texts[::2])
    assert all("<<SYS>>" in text and "be " in text for text in texts[1::2])


def test_the_model_learns_the_kept_answers_to_the_bare_prompts(tiny, files, tmp_path):
    """With a reward for one word, what was said under a pre-prompt is said without one."""
    config = configured(tiny, files, tmp_path / "run", safety=None, epochs=30, lr=1e-2)

    def reward(answers):
        return [float(sum(answer.ids) % 97) for answer in answers]

    distill.run(config, reward)
    kept = read_samples(tmp_path / "run" / "selected.jsonl")
    before, after = load_model(tiny / "chat"), load_model(tmp_path / "run" / "model")
    tokenizer = Tokenizer(tiny / "tokenizer.model")

    @torch.no_grad()
    def loss(model) -> float:
        total = 0.0
        for sample in kept:
            prompt = encode_prompt(tokenizer, sample["messages"])
            ids = torch.tensor(prompt + sample["tokens"])
            logits = model(ids[None, :-1])[0, len(prompt) - 1 :] @ model.lm_head.weight.T
            total += float(torch.nn.functional.cross_entropy(logits, ids[len(prompt) :]))
        return total / len(kept)

    assert loss(after) < 0.5 * loss(before)


def test_sampling_goes_on_where_it_was_killed(tiny, files, whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.toml", "inputs.json"):
        shutil.copy(whole / name, out / name)
    lines = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join(lines[:11]) + lines[11][:30])
    distill.run(configured(tiny, files, out))
    for name in ("samples.jsonl", "selected.jsonl", "metrics.jsonl", "distillation.json"):
        same = (out / name).read_text() == (whole / name).read_text()
        assert same or name == "metrics.jsonl"  # which has times
    losses = [[row["loss"] for row in rows_of(run / "metrics.jsonl")] for run in (out, whole)]
    assert losses[0] == losses[1]
    assert distill.run(configured(tiny, files, out)) == out / "model"


def test_edited_samples_and_late_options_are_named(tiny, files, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "finished.json").unlink()
    distill.run(configured(tiny, files, out, temperature=0.5, amend=True))
    assert (
        "'temperature' changed nothing: the answers are drawn and kept" in capsys.readouterr().out
    )
    (out / "finished.json").unlink()
    with (out / "selected.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="selected.jsonl is not what the run wrote"):
        distill.run(configured(tiny, files, out, temperature=0.5))


def test_where_no_answer_is_better_it_says_so_and_draws_anew(tiny, files, tmp_path):
    config = configured(tiny, files, tmp_path / "run", safety=None)
    with pytest.raises(ValueError, match="of 12 answers under a pre-prompt none is finished and"):
        distill.run(config, lambda answers: [1.0] * len(answers))
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    draws = iter(range(1000))
    final = distill.run(config, lambda answers: [float(next(draws)) for _ in answers])
    assert (final / "config.json").exists()


def test_a_judge_must_be_named_and_only_one(tiny, files, tmp_path):
    config = configured(tiny, files, tmp_path / "run")
    for given, reward in ((config, len), (replace(config, safety=None), None)):
        with pytest.raises(ValueError, match="name a safety reward model .safety. or hand a"):
            distill.run(given, reward)
    with pytest.raises(ValueError, match="holds a lm head|holds an lm head"):
        distill.run(replace(config, safety=tiny / "lm"))


@pytest.mark.parametrize("cls", [DistillConfig, RejectionConfig])
def test_the_fine_tuning_is_sfts_whatever_the_other_base_brings(cls):
    """Two bases have a learning rate: pretraining's once won."""
    found = cls(policy=Path("p"), out=Path("o"))
    assert (found.lr, found.batch, found.max_new_tokens) == (2e-5, 64, 512)
    assert found.epochs == (1 if cls is DistillConfig else 2)
