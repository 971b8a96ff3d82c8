"""Run: python -m pytest tests/test_rlhf.py -q"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from puna.core.checkpoint.folder import load_model
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import reward, rlhf
from puna.trainers.data.packing import encode_pairs
from puna.trainers.data.readers import read_preferences
from puna.trainers.rl import rounds
from puna.trainers.rl.comparisons import Verdict
from puna.trainers.rlhf import RLHFConfig, Waiting

SMALL = {"batch": 8, "micro_batch": 8, "lr": 1e-3}


def configured(tiny: Path, out: Path, **options) -> RLHFConfig:
    prompts = [tiny / "prompts.jsonl"]
    values = {
        "model": tiny / "chat",
        "prompts": prompts,
        "helpfulness_prompts": prompts,
        "safety_prompts": prompts,
        "versions": 2,
        "ppo_versions": 1,
        "helpfulness_pairs": 24,
        "safety_pairs": 16,
        "temperatures": [1.0, 1.5],
        "max_new_tokens": 8,
        "device": "cpu",
        "reward": {**SMALL, "eval_share": 0.2},
        "safety": {"safety_weight": 0.5},
        "rejection": {"samples": 3, "chunk": 8, "epochs": 1, "batch": 2, "micro_batch": 2},
        "ppo": {"iterations": 2, "batch": 8, "minibatch": 4, "lr": 1e-4, "save_every": 1},
    }
    return RLHFConfig(out=out, **(values | options))


def prefers_red(a, b) -> list[Verdict]:
    """Many words of red are better; more than three words are unsafe."""
    return [redder(x.text, y.text) for x, y in zip(a, b, strict=True)]


def redder(a: str, b: str) -> Verdict:
    chosen = int(b.count("red") > a.count("red"))
    rating = "better" if a.count("red") != b.count("red") else "negligibly_better"
    safe = [len(text.split()) <= 3 for text in ((a, b) if chosen == 0 else (b, a))]
    label = {(1, 1): "both_safe", (1, 0): "chosen_safe", (0, 0): "both_unsafe"}
    return Verdict(chosen, rating, label.get((safe[0], safe[1]), "chosen_unsafe"))


ANNOTATORS = {"helpfulness": prefers_red, "safety": prefers_red}


def files(out: Path) -> dict[str, str]:
    """Everything that a loop writes as text, without what depends on place and clock."""
    found = {}
    for path in sorted(out.rglob("*.jsonl")):
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        for row in rows:
            for name in [
                name for name in row if name.startswith("seconds") or name in ("model", "steps")
            ]:
                del row[name]
        found[str(path.relative_to(out))] = rows
    return found


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = dict(load_model(one).named_parameters()), load_model(other).named_parameters()
    return all(bool((ours[name] == parameter).all()) for name, parameter in theirs)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Two versions, the second with PPO."""
    out = tmp_path_factory.mktemp("rlhf") / "loop"
    assert rlhf.run(configured(tiny, out), ANNOTATORS) == out / "round-2" / "ppo" / "model"
    return out


def test_each_version_is_compared_judged_sampled_and_trained(tiny, whole):
    for number in (1, 2):
        folder = whole / f"round-{number}"
        assert load_model(folder / "helpfulness" / "model").head == "score"
        assert load_model(folder / "safety" / "model").head == "score"
        assert load_model(folder / "rejection" / "model").head == "lm"
        rows, _ = read_preferences(folder / "helpfulness.jsonl")
        assert {row.batch for row in rows} == {number}
    assert not (whole / "round-1" / "ppo").exists()
    assert not same_weights(whole / "round-2/ppo/model", whole / "round-2/rejection/model")


def test_the_second_round_compares_the_two_newest_models_and_starts_anew_from_sft(tiny, whole):
    one, two = ((whole / f"round-{n}" / "rejection" / "config.toml").read_text() for n in (1, 2))
    assert f'policy = "{tiny}/chat"' in one and f'student = "{tiny}/chat"' in one
    assert f'policy = "{whole}/round-1/rejection/model"' in two
    assert f'student = "{tiny}/chat"' in two and "round = 2" in two
    assert f'pools = ["{whole}/round-1/rejection/pool.jsonl"]' in two
    ppo = (whole / "round-2" / "ppo" / "config.toml").read_text()
    assert f'policy = "{whole}/round-2/rejection/model"' in ppo


def test_a_rounds_comparisons_are_an_ab_test_of_its_two_models(whole):
    rows = [json.loads(row) for row in (whole / "rounds.jsonl").open()]
    assert rows[0]["newest_wins"] == {}  # V1 has one model
    for kind in ("helpfulness", "safety"):
        found, _ = read_preferences(whole / "round-2" / f"{kind}.jsonl")
        given = [{row.chosen_model, row.rejected_model} for row in found]
        assert all(pair == {"V0", "V1"} for pair in given)
        share = sum(row.chosen_model == "V1" for row in found) / len(found)
        wins = rows[1]["newest_wins"][kind]
        assert wins["share"] == pytest.approx(share) and wins["low"] <= share <= wins["high"]
    assert rounds.newest_wins(whole / "round-2", 2) == rows[1]["newest_wins"]
    first, _ = read_preferences(whole / "round-1" / "helpfulness.jsonl")
    assert all(row.chosen_model == row.rejected_model == "V0" for row in first)


def test_the_pool_is_of_all_versions_or_of_the_last_alone(tiny, tmp_path):
    pools = (tmp_path / "one", tmp_path / "two")
    version = rlhf.Version(2, tiny, {}, tmp_path / "s", pools, tiny / "chat")
    config = configured(tiny, tmp_path)
    assert rlhf.pools_of(config, version) == version.pools and rlhf.pools_of(config, None) == ()
    assert rlhf.pools_of(replace(config, pool="last"), version) == ()


def test_reward_models_are_trained_on_all_comparisons_so_far(tiny, whole):
    text = (whole / "round-2" / "helpfulness" / "config.toml").read_text()
    data = ", ".join(f'"{whole}/round-{n}/helpfulness.jsonl"' for n in (1, 2))
    assert f"data = [{data}]" in text and f'model = "{whole}/round-1/rejection/model"' in text
    assert "safety_weight = 0.5" in (whole / "round-2" / "safety" / "config.toml").read_text()
    assert "safety_weight = 0.0" in text


def test_the_old_reward_models_are_asked_about_the_new_comparisons_first(tiny, whole):
    rows = [json.loads(row) for row in (whole / "rounds.jsonl").open()]
    assert [row["version"] for row in rows] == [1, 2]
    assert rows[0]["accuracy_before_training"] == {}
    before = rows[1]["accuracy_before_training"]
    for kind in ("helpfulness", "safety"):
        old = load_model(whole / "round-1" / kind / "model")
        found, _ = read_preferences(whole / "round-2" / f"{kind}.jsonl")
        pairs, _ = encode_pairs(Tokenizer(tiny / "tokenizer.model"), found, 256)
        expected = reward.accuracies(*reward.margins_of(old, pairs, 99, old.score.weight.device))
        assert before[kind] == pytest.approx(expected)
    assert set(rows[1]["accuracy_on_trained"]) == {"helpfulness", "safety"}
    assert rows[1]["model"] == str(whole / "round-2" / "ppo" / "model")


@pytest.mark.parametrize(
    "lost",
    [
        ["round-2"],
        ["round-2/safety.jsonl", "round-2/safety", "round-2/rejection", "round-2/ppo"],
        [
            "round-1/rejection/finished.json",
            "round-1/rejection/selected.jsonl",
            "round-2",
            "rounds.jsonl",
        ],
        ["round-2/ppo/model", "round-2/ppo/finished.json"],
    ],
)
def test_a_loop_goes_on_from_whatever_a_kill_left(tiny, whole, tmp_path, monkeypatch, lost):
    """What comes after some moment is missing; the same command writes it again, the same."""
    backup = tmp_path / "backup"
    shutil.copytree(whole, backup)
    try:
        for name in lost:
            path = whole / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        rlhf.run(configured(tiny, whole), ANNOTATORS)
        assert files(whole) == files(backup)
        assert same_weights(whole / "round-2/ppo/model", backup / "round-2/ppo/model")
    finally:
        shutil.rmtree(whole)
        shutil.copytree(backup, whole)


def test_without_annotators_it_waits_for_people_and_goes_on(tiny, whole, tmp_path):
    """People answer what the annotator would have; the loop ends as it did with him."""
    out = tmp_path / "loop"
    config = configured(tiny, out, versions=1, ppo_versions=0)
    for _ in range(2):
        with pytest.raises(
            Waiting, match="helpfulness-pairs.jsonl and safety-pairs.jsonl in .*run"
        ):
            rlhf.run(config)
    folder = out / "round-1"
    for kind in ("helpfulness", "safety"):
        pairs = f"{kind}-pairs.jsonl"
        assert (folder / pairs).read_text() == (whole / "round-1" / pairs).read_text()
    shutil.copy(whole / "round-1" / "safety.jsonl", folder)
    with pytest.raises(Waiting, match="^helpfulness-pairs.jsonl in .* waits for"):
        rlhf.run(config)
    shutil.copy(whole / "round-1" / "helpfulness.jsonl", folder)
    assert rlhf.run(config) == folder / "rejection" / "model"
    assert same_weights(folder / "rejection" / "model", whole / "round-1" / "rejection" / "model")


def test_going_on_trains_the_last_reward_models_with_fresh_data_only(tiny, tmp_path):
    out = tmp_path / "loop"
    rlhf.run(configured(tiny, out, go_on=True, ppo_versions=0), ANNOTATORS)
    text = (out / "round-2" / "safety" / "config.toml").read_text()
    assert f'data = ["{out}/round-2/safety.jsonl"]' in text
    assert f'model = "{out}/round-1/safety/model"' in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"versions": 0}, "versions is 0; it must be at least 1"),
        ({"ppo_versions": 3}, "there must not be more with PPO than there are"),
        ({"ppo": {"iteration": 3}}, r"\[ppo\]: unknown key 'iteration'; did you mean iterations"),
        ({"ppo": {"iterations": "many"}}, "'ppo.iterations' is 'many'; expected a whole number"),
        ({"reward": {"margins": "small"}}, r"\[reward\]: unknown key 'margins'; .*margin"),
        ({"max_new_tokens": 256}, "max_new_tokens 256 leaves no room for a prompt"),
        ({"temperatures": []}, "temperatures is empty"),
        ({"helpfulness_prompts": []}, "helpfulness_prompts is empty; name files of prompts"),
        ({"rejection": {"student": "x"}}, r"\[rejection\]: 'student' .* the loop's own `student`"),
        ({"rejection": {"pools": ["x"]}}, r"\[rejection\]: 'pools' cannot be set here"),
        ({"ppo": {"batch": 8, "minibatch": 3}}, "batch 8 is not a multiple of minibatch 3"),
        ({"ppo": {"policy": "x"}}, r"\[ppo\]: 'policy' cannot be set here"),
        ({"ppo": {"prompts": ["x"]}}, r"\[ppo\]: 'prompts' .* `prompts` and `ppo_prompts`"),
        ({"safety": {"data": ["x"]}}, r"\[safety\]: 'data' .* `helpfulness_data`"),
        ({"ppo": {"patience": 2}}, r"patience in \[ppo\] needs eval_prompts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(tiny, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        rlhf.run(configured(tiny, tmp_path / "loop", **options), ANNOTATORS)


def test_other_options_need_an_amendment_and_cost_nothing_that_is_done(tiny, whole, tmp_path):
    loop = tmp_path / "loop"
    shutil.copytree(whole, loop)
    shutil.rmtree(loop / "round-2" / "ppo")
    before = files(loop)
    options = configured(tiny, loop).rejection | {"samples": 9, "save_every": 77}
    changed = replace(configured(tiny, loop), rejection=options, device="cpu")
    with pytest.raises(ValueError, match=r"rejection.samples 9 where it was \d+\); .*--amend"):
        rlhf.run(changed, ANNOTATORS)
    rlhf.run(replace(changed, amend=True), ANNOTATORS)
    after = files(loop)
    assert {name: after[name] for name in before if name in after} == before
    assert "round-2/ppo/metrics.jsonl" in after
    (row,) = (loop / "amendments.jsonl").read_text().splitlines()
    assert json.loads(row)["changed"] == ["rejection.samples 9 where it was 3"]


def test_a_student_learns_from_every_versions_answers_and_each_stage_has_prompts_of_its_own(
    tiny, tmp_path
):
    out = tmp_path / "loop"
    prompts = [tiny / "prompts.jsonl"]
    config = configured(
        tiny, out, versions=1, student=tiny / "lm", rejection_prompts=prompts, ppo_prompts=prompts,
        eval_prompts=prompts,
    )  # fmt: skip
    rlhf.run(config, ANNOTATORS)
    folder = out / "round-1"
    assert not same_weights(folder / "student" / "model", tiny / "lm")
    assert not same_weights(folder / "student" / "model", folder / "rejection" / "model")
    assert not (folder / "student" / "samples.jsonl").exists()  # it learns from the others' answers
    for stage in ("rejection", "ppo"):
        text = (folder / stage / "config.toml").read_text()
        assert f'prompts = ["{prompts[0]}", "{prompts[0]}"]' in text
    rows = [json.loads(row) for row in (folder / "ppo" / "metrics.jsonl").open()]
    assert "eval_reward" in rows[0]


def test_with_a_reward_of_ones_own_nothing_is_compared_and_it_scores_every_stage(tiny, tmp_path):
    out = tmp_path / "loop"
    seen = []

    def red(answers):
        seen.extend(answers)
        return [answer.text.count("red") - 0.1 * len(answer.ids) for answer in answers]

    config = configured(tiny, out, helpfulness_prompts=[], safety_prompts=[])
    config.ppo = {**config.ppo, "critic": "policy"}
    final = rlhf.run(config, reward=red)
    assert final == out / "round-2" / "ppo" / "model" and load_model(final).head == "lm"
    assert not (out / "round-1" / "helpfulness").exists()
    assert not (out / "round-1" / "helpfulness-pairs.jsonl").exists()
    assert all(answer.prompt_ids and answer.ids for answer in seen)
    samples = [json.loads(row) for row in (out / "round-1/rejection/samples.jsonl").open()]
    for sample in samples:
        expected = sample["answer"].count("red") - 0.1 * len(sample["tokens"])
        assert sample["score"] == pytest.approx(expected, abs=1e-5) and sample["scores"] == {}
    rows = [json.loads(row) for row in (out / "round-2" / "ppo" / "metrics.jsonl").open()]
    assert "reward" in rows[0] and "reward_helpfulness" not in rows[0]


def test_a_finished_versions_ppo_stays_when_more_versions_are_asked_for(
    tiny, whole, tmp_path, capsys
):
    """It once fell back to what rejection sampling had given."""
    out = tmp_path / "loop"
    shutil.copytree(whole, out)
    rlhf.run(configured(tiny, out, versions=3, amend=True), ANNOTATORS)
    rows = [json.loads(row) for row in (out / "rounds.jsonl").open()]
    assert [Path(row["model"]).parent.name for row in rows] == ["rejection", "ppo", "ppo"]
    assert f"{out} is finished; V3 is {out}/round-3/ppo/model" in capsys.readouterr().out
    third = (out / "round-3" / "rejection" / "config.toml").read_text()
    assert f'policy = "{out}/round-2/ppo/model"' in third


def test_ghost_attention_follows_on_its_version_and_later_ones_start_from_it(tiny, tmp_path):
    judged = []

    def judge(answers):
        judged.extend(answers)
        return [True] * len(answers)

    options = {
        "gatt_version": 1,
        "gatt_dialogues": [tiny / "ghosts.jsonl"],
        "gatt_answers": 5,
        "gatt": {"epochs": 1, "targets": 2, "batch": 2, "micro_batch": 2},
    }
    out = tmp_path / "loop"
    config = configured(tiny, out, **options)
    last = rlhf.run(config, reward=None, annotators=ANNOTATORS, judge=judge)
    assert last == out / "round-2" / "ppo" / "model" and judged
    rows = [json.loads(row) for row in (out / "rounds.jsonl").open()]
    ghost = out / "round-1" / "gatt" / "model"
    assert [[*row["steps"]] for row in rows] == [["rejection", "gatt"], ["rejection", "ppo"]]
    assert rows[0]["model"] == rows[0]["steps"]["gatt"] == str(ghost)
    second = (out / "round-2" / "rejection" / "config.toml").read_text()
    assert f'policy = "{ghost}"' in second and f'student = "{ghost}"' in second
    selected = [json.loads(row) for row in (out / "round-1/rejection/selected.jsonl").open()]
    mixed = [json.loads(row)["messages"] for row in (out / "round-1/gatt-mix.jsonl").open()]
    assert [m[-1]["content"] for m in mixed] == [row["answer"] for row in selected[:5]]
    assert [m[:-1] for m in mixed] == [row["messages"] for row in selected[:5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gatt_version": 1}, "needs both"),
        ({"gatt_dialogues": [Path("x.jsonl")]}, "needs both"),
        ({"gatt_version": 3, "gatt_dialogues": [Path("x.jsonl")]}, "versions is 2"),
        ({"gatt": {"epochs": 1}}, "set gatt_version"),
    ],
)
def test_half_of_ghost_attention_is_refused(tiny, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        rlhf.check(configured(tiny, tmp_path, **options))


def test_a_judge_that_nobody_would_ask_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="judge"):
        rlhf.run(configured(tiny, tmp_path / "o"), ANNOTATORS, judge=lambda a: [True] * len(a))


@pytest.mark.parametrize("changed", [{"gatt_version": 2}, {"gatt_answers": 3}])
def test_where_ghost_attention_stands_is_fixed(tiny, tmp_path, changed):
    options = {"gatt_version": 1, "gatt_dialogues": [tiny / "ghosts.jsonl"]}
    config = configured(tiny, tmp_path / "loop", **options)
    with pytest.raises(Waiting):
        rlhf.run(config)
    with pytest.raises(ValueError, match=f"{next(iter(changed))}.*another --out"):
        rlhf.run(replace(config, amend=True, **changed))
