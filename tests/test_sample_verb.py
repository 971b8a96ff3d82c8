"""`puna sample`: answers without training, and what is done with them afterwards.
Run: python -m pytest tests/test_sample_verb.py -q"""

import json

import pytest

from puna.core.checkpoint.folder import load_model
from puna.trainers import rejection, sample, score
from puna.trainers.rejection import RejectionConfig
from puna.trainers.rl import sampling
from puna.trainers.rl.best_of import best_few, best_of, read_drawn, read_samples
from puna.trainers.sample import SampleConfig
from puna.trainers.score import ScoreConfig

OPTIONS = {
    "samples": 3, "chunk": 5, "max_new_tokens": 12, "temperature": 1.0, "device": "cpu",
}  # fmt: skip


def configured(tiny, out, *, scored: bool, **options) -> SampleConfig:
    judges = {"helpfulness": tiny / "helpfulness", "safety": tiny / "safety"} if scored else {}
    prompts = [tiny / "prompts.jsonl"]
    return SampleConfig(
        policy=tiny / "chat", prompts=prompts, out=out, **judges, **(OPTIONS | options)
    )


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "scored"
    assert sample.run(configured(tiny, out, scored=True)) == out / "samples.jsonl"
    return out


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "plain"
    sample.run(configured(tiny, out, scored=False))
    return out


def test_it_draws_what_rejection_draws(tiny, scored, tmp_path):
    config = RejectionConfig(
        policy=tiny / "chat", prompts=[tiny / "prompts.jsonl"], out=tmp_path / "run",
        helpfulness=tiny / "helpfulness", safety=tiny / "safety", epochs=1, batch=8, **OPTIONS,
    )  # fmt: skip
    rejection.run(config)
    for name in ("samples.jsonl", "selected.jsonl", "pool.jsonl", "selection.json"):
        assert (config.out / name).read_bytes() == (scored / name).read_bytes()
    samples = read_samples(scored / "samples.jsonl")
    assert read_samples(scored / "selected.jsonl") == best_of(samples)
    assert read_samples(scored / "pool.jsonl") == best_few(samples, 4)


def test_large_to_small_is_two_commands(tiny, scored, tmp_path):
    config = RejectionConfig(
        policy=tiny / "lm", selected=scored / "selected.jsonl", out=tmp_path / "small", epochs=2,
        batch=4, lr=1e-2, device="cpu",
    )  # fmt: skip
    model = load_model(rejection.run(config))
    before = load_model(tiny / "lm")
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert not (config.out / "samples.jsonl").exists()


def test_without_reward_models_there_are_no_scores(tiny, scored, plain, tmp_path):
    drawn = read_drawn(plain / "samples.jsonl")
    judged = read_samples(scored / "samples.jsonl")
    assert [{**one, "score": two["score"], "scores": two["scores"]} for one, two in zip(
        drawn, judged, strict=True
    )] == judged  # fmt: skip
    assert sorted(path.name for path in plain.iterdir() if path.suffix == ".jsonl") == [
        "samples.jsonl"
    ]
    with pytest.raises(ValueError, match=r"samples.jsonl:1: the sample lacks score, scores"):
        read_samples(plain / "samples.jsonl")


def test_where_the_answers_are_is_said_each_time(tiny, tmp_path, capsys):
    for _ in range(2):  # the second finds all of them there
        sample.run(configured(tiny, tmp_path / "plain", scored=False, samples=1))
        assert f"{tmp_path}/plain/samples.jsonl has all answers" in capsys.readouterr().out


def test_score_gives_them_the_scores_that_they_would_have_had(tiny, scored, plain, tmp_path):
    out = tmp_path / "scored.jsonl"
    score.run(
        ScoreConfig(
            model=tiny / "helpfulness", safety=tiny / "safety", device="cpu", out=out,
            data=[plain / "samples.jsonl"],
        )
    )  # fmt: skip
    for one, two in zip(read_samples(out), read_samples(scored / "samples.jsonl"), strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-5)
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-5)


def test_rejection_chooses_among_them_as_a_pool(tiny, plain, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "moon fish"}\n')
    config = RejectionConfig(
        policy=tiny / "chat", prompts=[few], out=tmp_path / "run", pools=[plain / "samples.jsonl"],
        helpfulness=tiny / "helpfulness", epochs=1, batch=8, round=2, **OPTIONS,
    )  # fmt: skip
    rejection.run(config)
    selection = json.loads((config.out / "selection.json").read_text())
    assert selection["kept_by_round"]["1"] > 5


@pytest.mark.parametrize("lines", [0, 20, 40, 48])
def test_it_goes_on_where_a_kill_left_it(tiny, plain, tmp_path, lines, monkeypatch):
    config = configured(tiny, tmp_path / "run", scored=False)
    config.out.mkdir()
    for name in ("config.toml", "inputs.json"):
        (config.out / name).write_text((plain / name).read_text())
    rows = (plain / "samples.jsonl").read_text().splitlines(keepends=True)
    torn = rows[lines][:30] if lines < len(rows) else ""
    (config.out / "samples.jsonl").write_text("".join(rows[:lines]) + torn)
    chunks = []
    whole = sampling.sample_chunk

    def watch(*arguments):
        chunks.append(list(arguments[4]))
        return whole(*arguments)

    monkeypatch.setattr(sampling, "sample_chunk", watch)
    sample.run(config)
    assert len(chunks) == {0: 4, 20: 3, 40: 2, 48: 0}[lines]
    assert (config.out / "samples.jsonl").read_bytes() == (plain / "samples.jsonl").read_bytes()


def test_a_function_can_score(tiny, tmp_path):
    config = configured(tiny, tmp_path / "run", scored=False)
    sample.run(config, reward=lambda answers: [len(answer.text) for answer in answers])
    for kept in read_samples(config.out / "selected.jsonl"):
        assert kept["score"] == len(kept["answer"])


def test_what_cannot_be_is_refused(tiny, plain, tmp_path):
    with pytest.raises(ValueError, match="pool_samples and temperatures are of scored"):
        sample.run(configured(tiny, tmp_path / "run", scored=False, pool_samples=2))
    with pytest.raises(ValueError, match="temperature 0.5 where it was 1.0.*another --out"):
        sample.run(configured(tiny, plain, scored=False, temperature=0.5))


def test_the_temperature_is_the_one_whose_best_answers_score_highest(tiny, tmp_path, capsys):
    def colder(answers):  # short answers are better: what a temperature near zero draws
        return [float(-len(answer.ids)) for answer in answers]

    tried = (1.4, 0.5, 1.0)
    out = tmp_path / "chosen"
    options = {"temperatures": list(tried), "chunk": 4}
    sample.run(configured(tiny, out, scored=False, **options), colder)
    found = json.loads((out / "temperatures.json").read_text())
    by_hand = {}
    for temperature in tried:
        alone = tmp_path / str(temperature)
        sample.run(configured(tiny, alone, scored=False, temperature=temperature, chunk=4), colder)
        best = {}
        for row in map(json.loads, (alone / "samples.jsonl").open()):
            usable = row["finished"] and row["answer"]
            best.setdefault(row["prompt"], []).append((bool(usable), row["score"]))
        rows = [best[number] for number in range(4)]
        by_hand[str(temperature)] = sum(
            max((s for ok, s in row if ok), default=min(s for _, s in row)) for row in rows
        ) / len(rows)
    assert found == pytest.approx(by_hand)
    chosen = max(by_hand, key=by_hand.get)
    same = (tmp_path / chosen / "samples.jsonl").read_text()
    assert (out / "samples.jsonl").read_text() == same
    assert f"temperature {chosen}" in capsys.readouterr().out


def test_temperatures_without_a_score_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="temperatures"):
        sample.run(configured(tiny, tmp_path / "o", scored=False, temperatures=[0.5, 1.0]))
