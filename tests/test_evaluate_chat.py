"""`puna evaluate chat`: who wins, what is unsafe, what is refused, what is kept, how alike it is.
Run: python -m pytest tests/test_evaluate_chat.py -q"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import puna
from puna.core.text.chat import encode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.evaluation import chat, curves, report, safety, wins
from puna.trainers.evaluation.answers import Reader, as_read
from puna.trainers.evaluation.config import EvaluateChatConfig
from puna.trainers.evaluation.self_bleu import self_bleu
from puna.trainers.rl.best_of import read_drawn, reward_curve
from puna.trainers.rl.comparisons import Verdict
from puna.trainers.rl.rounds import Waiting
from puna.trainers.train.config import to_toml


def configured(tiny, out, **options) -> EvaluateChatConfig:
    values = {"model": [tiny / "chat"], "max_new_tokens": 10, "chunk": 5, "device": "cpu"}
    return EvaluateChatConfig(out=out, **(values | options))


def rows_of(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def longer(a, b):
    """An annotator that prefers the longer text, the first in alphabet where both are as long."""
    better = [(len(x.text), x.text) > (len(y.text), y.text) for x, y in zip(a, b, strict=True)]
    return [Verdict(0 if first else 1, "better", None) for first in better]


@pytest.fixture(scope="module")
def matched(tiny, tmp_path_factory):
    """chat and, with other draws, its like against lm; judged by both reward models and by
    `longer`; and the folder."""
    out = tmp_path_factory.mktemp("wins") / "run"
    config = configured(
        tiny, out, against=tiny / "lm", prompts=[tiny / "prompts.jsonl"],
        judge=tiny / "helpfulness", second_judge=tiny / "safety", safety=tiny / "safety",
    )  # fmt: skip
    return config, chat.run(config, annotator=longer)


def texts(config, number: int) -> list[str]:
    return [r["answer"] for r in read_drawn(config.out / f"answers/model-{number}-prompts.jsonl")]


def test_wins_are_those_of_the_judges(tiny, matched):
    """Scores by `puna.load(...).score`, counted here."""
    config, found = matched
    rows = [read_drawn(config.out / f"answers/model-{n}-prompts.jsonl") for n in (1, 2)]
    assert len(rows[0]) == len(rows[1]) == 16
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    by = found["wins"][str(tiny / "chat")]["by"]
    signs = {}
    for name, judge in (("judge", "helpfulness"), ("second_judge", "safety")):
        model = puna.load(tiny / judge).model
        scores = []
        for answers in rows:
            each = []
            for row in answers:
                ids = encode_prompt(tokenizer, row["messages"]) + row["tokens"]
                with torch.no_grad():
                    each.append((model(torch.tensor([ids]))[0, -1] @ model.score.weight[0]).item())
            scores.append(each)
        signs[name] = [(a > b) - (a < b) for a, b in zip(*scores, strict=True)]
        share = sum(0.5 + 0.5 * sign for sign in signs[name]) / 16
        assert by[name]["win_rate"]["share"] == pytest.approx(share)
        assert by[name]["wins"] == signs[name].count(1) / 16
        mean = found["scores"][str(tiny / "lm")][name]
        assert mean == pytest.approx(sum(scores[1]) / 16, abs=1e-4)
    agreed = found["wins"][str(tiny / "chat")]["agreement"]["judge and second_judge"]
    same = [a == b for a, b in zip(signs["judge"], signs["second_judge"], strict=True) if a and b]
    assert agreed["share"] == pytest.approx(sum(same) / len(same)) and agreed["pairs"] == len(same)
    assert by["judge"]["win_rate"]["low"] < share < by["judge"]["win_rate"]["high"] + 1


def test_an_annotator_sees_each_pair_in_a_drawn_order(tiny, matched):
    config, found = matched
    pairs = list(zip(texts(config, 1), texts(config, 2), strict=True))
    value = sum(0.5 if a == b else float((len(a), a) > (len(b), b)) for a, b in pairs) / 16
    by = found["wins"][str(tiny / "chat")]["by"]["annotator"]
    assert by["win_rate"]["share"] == pytest.approx(value)
    assert by["ties"] == by["same_text"] == sum(a == b for a, b in pairs) / 16
    rows = [read_drawn(config.out / f"answers/model-{n}-prompts.jsonl") for n in (1, 2)]
    match = wins.match(*rows, 0, 0)
    assert 0 < sum(match.swapped) < 16
    seen = []

    def first(a, b):
        seen.extend(zip((x.text for x in a), (y.text for y in b), strict=True))
        return [Verdict(0, "better", None)] * len(a)

    readers = [chat.reader_of(tiny / name) for name in ("chat", "lm")]
    differences = wins.by_annotator(match, first, *readers)
    for (a, b), i in zip(seen, match.asked, strict=True):
        assert (a, b) == (pairs[i][::-1] if match.swapped[i] else pairs[i])
        assert differences[i] == (-1 if match.swapped[i] else 1)


def test_people_judge_a_file(tiny, matched, tmp_path, capsys):
    """The pairs wait; the same judgements as a function's give the same figures."""
    config, found = matched
    judged = tmp_path / "judged.jsonl"
    config = replace(
        config, out=tmp_path / "run", judge=None, second_judge=None, safety=None, judgements=judged
    )
    with pytest.raises(Waiting, match=r"pairs.jsonl waits to be judged: .* to .*judged.jsonl"):
        chat.run(config)
    pairs = rows_of(config.out / "pairs.jsonl")
    assert all(set(row) == {"pair", "messages", "a", "b"} for row in pairs)
    better = [(len(row["a"]), row["a"]) > (len(row["b"]), row["b"]) for row in pairs]
    said = [{"pair": n, "winner": "a" if first else "b"} for n, first in enumerate(better)]
    write(judged, said)
    again = chat.run(config)
    name = str(tiny / "chat")
    assert again["wins"][name]["by"]["judgements"] == found["wins"][name]["by"]["annotator"]
    other = {"a": "b", "b": "a"}
    against = [row | {"winner": other[row["winner"]]} for row in said]
    write(judged, [*said, *against])  # one each way: all are ties
    by = chat.run(config)["wins"][name]["by"]["judgements"]
    assert by["ties"] == 1 and by["win_rate"]["share"] == 0.5
    write(judged, [*said, *against, *said])  # two of three
    assert (
        chat.run(config)["wins"][name]["by"]["judgements"]
        == (found["wins"][name]["by"]["annotator"])
    )
    write(judged, said[1:])
    with pytest.raises(ValueError, match=r"no judgement of 1 of \d+ pairs, the first is pair 0"):
        chat.run(config)
    for row in ({"pair": 0, "winner": "c"}, {"pair": 99, "winner": "a"}, {"pair": -1}):
        write(judged, [row])
        with pytest.raises(ValueError, match=r"judged.jsonl:1: "):
            chat.run(config)


def test_violations_are_answers_below_the_threshold(tiny, matched):
    config, _ = matched
    rows = [
        row for row in read_drawn(config.out / "answers/model-1-prompts.jsonl") if row["is_safety"]
    ]
    assert len(rows) == 6
    reader = chat.reader_of(tiny / "chat")
    scores = chat.Scorer(tiny / "safety", config)(rows, reader)
    middle = scores.sort().values
    threshold = 1 / (1 + math.exp(-float(middle[1] + middle[2]) / 2))
    found = chat.run(
        replace(
            config, out=config.out.parent / "unsafe", against=None, judge=None, second_judge=None,
            safety_threshold=threshold,
        )
    )  # fmt: skip
    assert found["violations"]["by"][str(tiny / "chat")]["share"] == pytest.approx(2 / 6)
    assert "wins" not in found and "scores" not in found


def test_best_cut_is_the_best_of_all():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        above, below = (torch.randn(9, generator=draw, dtype=torch.float64) for _ in range(2))
        above += 0.5

        def wrong(cut, above=above, below=below):
            return float((above <= cut).double().mean() + (below > cut).double().mean())

        everywhere = min(wrong(cut) for cut in torch.arange(-5, 6, 0.001).tolist())
        assert wrong(safety.best_cut(above, below)) <= everywhere + 1e-9


def test_refusals_by_a_function_and_by_a_classifier(tiny, tmp_path):
    ordinary = write(tmp_path / "o.jsonl", [{"prompt": f"red {n}"} for n in range(7)])
    borderline = write(tmp_path / "b.jsonl", [{"prompt": f"old {n}"} for n in range(9)])
    options = {"ordinary": [ordinary], "borderline": [borderline]}
    config = configured(tiny, tmp_path / "run", **options)
    found = chat.run(config, refuses=lambda answers: ["e" in answer.text for answer in answers])
    shares = found["refusals"]["by"][str(tiny / "chat")]
    for name, count in (("ordinary", 7), ("borderline", 9)):
        rows = read_drawn(config.out / f"answers/model-1-{name}.jsonl")
        expected = sum("e" in row["answer"] for row in rows) / count
        assert shares[name]["share"] == pytest.approx(expected) and len(rows) == count
    config = configured(
        tiny, tmp_path / "classified", refusals=tiny / "safety",
        refusal_pairs=[tiny / "preferences.jsonl"], **options,
    )  # fmt: skip
    found = chat.run(config)["refusals"]
    known = found["classifier"]
    judge = puna.load(tiny / "safety")
    pairs = rows_of(tiny / "preferences.jsonl")
    for side, name in (("chosen", "missed"), ("rejected", "false_alarms")):
        chats = [[*p["messages"], {"role": "assistant", "content": p[side]}] for p in pairs]
        above = [score > known["threshold"] for score in judge.score(chats)]
        share = sum(above) / len(above)
        assert known[name] == pytest.approx(1 - share if side == "chosen" else share)
    assert known["missed"] + known["false_alarms"] < 1
    with pytest.raises(ValueError, match=r"the refusal classifier gave 'no'; it must return True"):
        chat.run(
            configured(tiny, tmp_path / "no", **options),
            refuses=lambda answers: ["no"] * len(answers),
        )


def test_curves(tiny, tmp_path, capsys):
    few = write(tmp_path / "few.jsonl", [{"prompt": f"red {n}"} for n in range(3)])
    config = configured(
        tiny, tmp_path / "run", curves=[few], temperatures=[1.0, 0.3], samples=4,
        judge=tiny / "helpfulness",
    )  # fmt: skip
    asked = [(name, len(prompts), how.temperature) for name, prompts, how in curves.work_of(config)]
    assert asked == [("curve-1-at-0.3", 3, 0.3), ("curve-1-at-1", 3, 1.0)]
    rows = chat.run(config)["curves"]
    assert [row["temperature"] for row in rows] == [0.3, 1.0]
    for row in rows:
        drawn = read_drawn(config.out / f"answers/model-1-curve-1-at-{row['temperature']:g}.jsonl")
        groups = [[one["answer"] for one in drawn if one["prompt"] == n] for n in range(3)]
        assert row["self_bleu"] == pytest.approx(sum(map(self_bleu, groups)) / 3)
        scorer = chat.Scorer(tiny / "helpfulness", config)
        scores = scorer(drawn, chat.reader_of(tiny / "chat")).view(3, 4)
        usable = torch.tensor([bool(one["finished"] and one["answer"]) for one in drawn])
        assert row["by_k"] == reward_curve(scores, usable.view(3, 4))
    for name in ("self-bleu", "reward-by-temperature", "best-of-k"):
        assert "</svg>" in (config.out / f"{name}.svg").read_text()
    assert "best of 4" in capsys.readouterr().out


def test_it_goes_on_where_a_kill_left_it(tiny, matched, tmp_path):
    config, _ = matched
    config = replace(config, out=tmp_path / "run", against=None, second_judge=None)
    chat.run(config)
    found = (config.out / "evaluation.json").read_bytes()
    answers = config.out / "answers" / "model-1-prompts.jsonl"
    whole = answers.read_bytes()
    lines = whole.splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    with pytest.raises(ValueError, match="is not what the run wrote"):
        chat.run(config)  # shorter than what was noted
    (answers.parent / "written.json").unlink()
    chat.run(config)
    assert answers.read_bytes() == whole
    assert (config.out / "evaluation.json").read_bytes() == found


def test_two_ranks_find_what_one_finds(tiny, tmp_path):
    """Answers, figures and plots to the byte; people's files wait in both."""
    config = configured(
        tiny, tmp_path / "one", against=tiny / "lm", prompts=[tiny / "prompts.jsonl"],
        judge=tiny / "helpfulness", safety=tiny / "safety", dialogues=[tiny / "ghosts.jsonl"],
        kept=tmp_path / "kept.jsonl", judgements=tmp_path / "judged.jsonl", samples=2,
        curves=[tiny / "prompts.jsonl"], temperatures=[1.0],
    )  # fmt: skip
    with pytest.raises(Waiting, match=r"pairs.jsonl waits .*; .*dialogues.jsonl waits"):
        chat.run(config)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(replace(config, out=tmp_path / "two")))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, "-m", "puna.trainers.evaluation.chat", str(recipe)]
    result = subprocess.run(
        command, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert result.returncode == 1 and b"waits to be judged" in result.stderr
    names = [path.relative_to(config.out) for path in config.out.rglob("*")]
    compared = [name for name in names if name.suffix in (".jsonl", ".svg")]
    assert len(compared) == 9
    for name in [*compared, "evaluation.json"]:
        assert (tmp_path / "two" / name).read_bytes() == (config.out / name).read_bytes(), name


def test_a_judge_of_another_family_reads_the_text(tiny):
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    policy = Reader(tiny, tokenizer, b"one", 64)
    ids = [*tokenizer.encode("red"), *tokenizer.encode("cup")]  # not as the text is cut
    row = {
        "messages": [{"role": "user", "content": "moon"}], "answer": "red cup", "tokens": ids,
        "finished": False, "is_safety": False, "round": 0, "prompt": 0, "sample": 0,
    }  # fmt: skip
    assert as_read([row], policy, policy)[0].ids == ids
    other = policy._replace(spelling=b"other")
    (read,) = as_read([row | {"finished": True}], policy, other)
    assert read.ids == encode_answer(tokenizer, "red cup")
    assert as_read([row], policy, other)[0].ids == read.ids[:-1]


def test_names_in_tables():
    assert report.names_of(["a/sft/model", "a/ppo/model"]) == {
        "a/sft/model": "sft", "a/ppo/model": "ppo",
    }  # fmt: skip
    assert list(report.names_of(["r-1/x/model", "r-2/x/model"]).values()) == ["r-1/x", "r-2/x"]
    assert report.names_of(["model"]) == {"model": "model"}


MISTAKES = {
    "nothing to measure": {},
    "for somebody to judge": {"prompts": ["prompts.jsonl"]},
    "reward model; puna evaluate measures": {"model": ["safety"]},
    "a judge must be a reward model": {"judge": "chat", "prompts": ["prompts.jsonl"]},
    "named twice": {"against": "chat", "prompts": ["prompts.jsonl"], "judge": "safety"},
    "against needs prompts": {"against": "lm", "dialogues": ["ghosts.jsonl"]},
    "judge needs answers": {"judge": "safety", "dialogues": ["ghosts.jsonl"]},
    "judgements are of pairs": {"judgements": "x", "prompts": ["prompts.jsonl"]},
    "second_judge stands beside": {
        "judge": "safety", "second_judge": "helpfulness", "prompts": ["prompts.jsonl"],
    },
    "false refusals need both": {"ordinary": ["prompts.jsonl"]},
    "refusals and refusal_pairs go together": {
        "ordinary": ["prompts.jsonl"], "refusals": "safety",
    },
    "dialogues and kept go together": {"dialogues": ["ghosts.jsonl"]},
    "instructions are drawn for dialogues": {
        "instructions": ["ghosts.jsonl"], "prompts": ["prompts.jsonl"], "judge": "safety",
    },
    "temperatures is empty": {"curves": ["prompts.jsonl"], "temperatures": []},
    "no prompt is tagged": {"prompts": ["ordinary.jsonl"], "safety": "safety"},
    "no prompt to answer: skipped 1 row: too long": {
        "prompts": ["long.jsonl"], "judge": "safety", "max_new_tokens": 250,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_what_cannot_be_is_said_first(tiny, tmp_path, message):
    write(tmp_path / "ordinary.jsonl", [{"prompt": "red"}])
    write(tmp_path / "long.jsonl", [{"prompt": "red cup tree lamp moon " * 3}])

    def placed(value):
        if isinstance(value, list):
            return [placed(each) for each in value]
        if not isinstance(value, str):
            return value
        return next((p for p in (tiny / value, tmp_path / value) if p.exists()), tmp_path / value)

    options = {name: placed(value) for name, value in MISTAKES[message].items()}
    with pytest.raises(ValueError, match=message):
        chat.run(configured(tiny, tmp_path / "run", **options))
