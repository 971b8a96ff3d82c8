"""Run: python -m pytest tests/test_gatt.py -q"""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.core.checkpoint.folder import load_model
from puna.core.text.chat import decode_answer, encode_answer, encode_dialogue, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import gatt
from puna.trainers.data.ghost import GhostDialogue, read_ghost_dialogues
from puna.trainers.gatt import GAttConfig
from puna.trainers.rl.exchanges import Exchange, load_turns
from puna.trainers.train import written


def configured(tiny: Path, out: Path, **options) -> GAttConfig:
    values = {
        "model": tiny / "chat",
        "dialogues": [tiny / "ghosts.jsonl"],
        "max_new_tokens": 10,
        "epochs": 3,
        "batch": 2,
        "micro_batch": 2,
        "lr": 1e-3,
        "device": "cpu",
    }
    return GAttConfig(out=out, **(values | options))


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer(tiny / "tokenizer.model")


@pytest.fixture(scope="module")
def ghosts(tiny):
    return read_ghost_dialogues([tiny / "ghosts.jsonl"], [], 0)[0]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("gatt") / "run"
    gatt.run(configured(tiny, out))
    return out


def exchanges(tokenizer, *turns: tuple[str, str]) -> list[Exchange]:
    return [Exchange(user, encode_answer(tokenizer, answer), True) for user, answer in turns]


TURNS = (("red cup", "moon"), ("old tree", "fish nine"), ("why", "sing"))


def as_messages(*turns: tuple[str, str]):
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def test_an_example_has_the_instruction_in_its_first_message_and_loss_on_its_last_answer(tokenizer):
    ids, weights = gatt.example(tokenizer, "be green", exchanges(tokenizer, *TURNS), {2})
    told = [{"role": "system", "content": "be green"}, *as_messages(*TURNS)]
    whole_ids, whole_weights = encode_dialogue(tokenizer, told)
    assert ids == whole_ids and ids[-1] == tokenizer.eos_id
    last = len(encode_answer(tokenizer, "sing"))
    assert weights == [0.0] * (len(ids) - last) + [1.0] * last
    assert sum(weights) < sum(whole_weights)


def test_while_sampling_every_user_message_has_the_instruction(tiny, tokenizer):
    dialogue = GhostDialogue("be green", "green", [user for user, _ in TURNS])
    config = configured(tiny, Path("o"))
    history = exchanges(tokenizer, *TURNS[:2])
    found = gatt._context(config, tokenizer, dialogue, history)
    told = [{"role": "system", "content": "be green"}, *as_messages(*TURNS)[:-1]]
    assert found == encode_prompt(tokenizer, told, system_every_turn=True)
    near = gatt._context(replace(config, window=1), tokenizer, dialogue, history)
    told = [{"role": "system", "content": "be green"}, *as_messages(*TURNS)[2:-1]]
    assert near == encode_prompt(tokenizer, told, system_every_turn=True)


def told_of(tokenizer, ids: list[int]) -> str:
    """The system message of an example."""
    text = tokenizer.decode(ids)
    return text[text.index("<<SYS>>") + 7 : text.index("<</SYS>>")].strip()


def examples(monkeypatch, tiny, tokenizer, ghosts, sampled, **options):
    """What `training_rows` packs."""
    seen = []
    packed = gatt.PackedRows

    def watched(sequences, *args, **kwargs):
        seen.extend(sequences)
        return packed(sequences, *args, **kwargs)

    config = configured(tiny, Path("o"), **options)
    with monkeypatch.context() as patch:
        patch.setattr(gatt, "PackedRows", watched)
        gatt.training_rows(config, tokenizer, ghosts, sampled, 256)
    return seen


def test_without_repeat_it_stands_in_the_first_message_alone(tiny, tokenizer):
    dialogue = GhostDialogue("be green", "green", ["red cup", "old tree", "why"])
    config = configured(tiny, tiny / "none", repeat=False)
    history = exchanges(tokenizer, *TURNS[:2])
    messages = [{"role": "system", "content": "be green"}, *as_messages(*TURNS[:2])]
    asked = encode_prompt(tokenizer, [*messages, {"role": "user", "content": "why"}])
    assert gatt._context(config, tokenizer, dialogue, history) == asked
    with pytest.raises(ValueError, match="window leaves the instruction out: set it to 0"):
        replace(config, window=1)


def test_without_the_mask_all_answers_are_learned(tokenizer):
    found = gatt.example(tokenizer, "be green", exchanges(tokenizer, *TURNS), {2}, mask=False)
    told = [{"role": "system", "content": "be green"}, *as_messages(*TURNS)]
    assert found == encode_dialogue(tokenizer, told)


def test_the_instruction_is_shortened_about_half_of_the_time(monkeypatch, tiny, tokenizer):
    ghosts = [GhostDialogue("always be green", "green", ["red", "blue"])] * 300
    sampled = [exchanges(tokenizer, ("red", "cup"), ("blue", "moon"))] * 300
    found = examples(monkeypatch, tiny, tokenizer, ghosts, sampled)
    told = [told_of(tokenizer, ids) for ids, _ in found]
    assert len(told) == 300 and set(told) == {"green", "always be green"}
    assert 0.4 < told.count("green") / 300 < 0.6  # 3.4 standard deviations
    for shorten, expected in ((0.0, "always be green"), (1.0, "green")):
        found = examples(monkeypatch, tiny, tokenizer, ghosts, sampled, shorten=shorten)
        assert {told_of(tokenizer, ids) for ids, _ in found} == {expected}


def learned(tokenizer, ids: list[int], weights: list[float]) -> list[str]:
    """The answers that a row has loss on."""
    runs = itertools.groupby(zip(ids, weights, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]).strip() for on, run in runs if on]


def test_a_dialogue_is_one_row_with_several_targets(monkeypatch, tiny, tokenizer):
    turns = [(f"red {i}", f"answer {i}") for i in range(6)]
    ghosts = [GhostDialogue("be", "be", [user for user, _ in turns])]
    sampled = [exchanges(tokenizer, *turns)]
    sampled[0][4] = sampled[0][4]._replace(obeys=False)
    ((ids, weights),) = examples(monkeypatch, tiny, tokenizer, ghosts, sampled, targets=9)
    assert learned(tokenizer, ids, weights) == [f"answer {i}" for i in (0, 1, 2, 3, 5)]
    ((ids, weights),) = examples(monkeypatch, tiny, tokenizer, ghosts, sampled, targets=2)
    said = learned(tokenizer, ids, weights)
    assert len(said) == 2 and ids[-1] == tokenizer.eos_id and weights[-1] == 1.0


def test_one_row_has_the_gradient_of_a_row_for_each_target(tiny, tokenizer):
    model = load_model(tiny / "lm")
    turns = exchanges(tokenizer, *TURNS)

    def gradient(rows):
        model.zero_grad()
        for ids, weights in rows:
            tokens = torch.tensor([ids])
            logits = model.logits(model(tokens))[0, :-1].double()
            losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
            (losses * torch.tensor(weights[1:])).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    apart = [gatt.example(tokenizer, "be", turns[: turn + 1], {turn}) for turn in (0, 2)]
    together = [gatt.example(tokenizer, "be", turns, {0, 2})]
    for one, other in zip(gradient(together), gradient(apart), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_answers_beyond_the_context_are_left_out_and_counted(monkeypatch, tiny, tokenizer, capsys):
    turns = [(f"red {i}", f"answer {i}") for i in range(30)]
    ghosts = [GhostDialogue("be", "be", [user for user, _ in turns])]
    sampled = [exchanges(tokenizer, *turns)]
    ((ids, weights),) = examples(monkeypatch, tiny, tokenizer, ghosts, sampled, targets=30)
    assert len(ids) <= 256 < len(gatt.example(tokenizer, "be", sampled[0], {29})[0])
    beyond = 30 - len(learned(tokenizer, ids, weights))
    assert beyond > 0 and f"{beyond} rows: answers beyond the context" in (capsys.readouterr().out)


def test_ordinary_dialogues_are_mixed_in_with_loss_on_all_their_answers(
    monkeypatch, tiny, tokenizer, ghosts
):
    sampled = [exchanges(tokenizer, *((user, "moon") for user in g.turns)) for g in ghosts]
    mix = {"mix": [tiny / "dialogues.jsonl"]}
    found = examples(monkeypatch, tiny, tokenizer, ghosts, sampled, **mix)
    alone = examples(monkeypatch, tiny, tokenizer, ghosts, sampled)
    rows = (tiny / "dialogues.jsonl").read_text().splitlines()
    expected = [encode_dialogue(tokenizer, json.loads(row)["messages"]) for row in rows]
    assert found == [*alone, *expected]


def test_only_answers_that_the_judge_accepts_and_that_end_become_targets(tokenizer):
    dialogue = GhostDialogue("be", "be", ["red"])
    asked = []

    def judge(answers):
        for answer in answers:
            said = [(message["role"], message["content"]) for message in answer.messages]
            assert said == [("system", "be"), ("user", "red")] and answer.prompt_ids == [7]
            asked.append((answer.text, answer.ids))
        return [answer.text == "cup" for answer in answers]

    blue, cup = encode_answer(tokenizer, "blue"), encode_answer(tokenizer, "cup")
    cut, silent = cup[:-1], [tokenizer.eos_id]
    choose = gatt._choose
    assert choose(tokenizer, dialogue, [], [7], [blue, cut, cup], judge) == Exchange(
        "red", cup, True
    )
    assert asked == [("blue", blue), ("cup", cup)]
    assert choose(tokenizer, dialogue, [], [7], [blue, cut], judge) == Exchange("red", blue, False)
    assert choose(tokenizer, dialogue, [], [7], [cut], None) == Exchange("red", cup, False)
    assert choose(tokenizer, dialogue, [], [7], [silent, blue], None) == Exchange("red", blue, True)
    with pytest.raises(ValueError, match="the judge gave 0 verdicts for 1 answer;"):
        choose(tokenizer, dialogue, [], [7], [blue], lambda answers: [])
    with pytest.raises(ValueError, match="the judge gave more than 1 verdict for 1 answer;"):
        choose(tokenizer, dialogue, [], [7], [blue], lambda answers: itertools.count())


@pytest.mark.parametrize("said", ["no", "yes", None, 0.5, float("nan"), 2, [], "a tensor"])
def test_a_verdict_that_is_neither_yes_nor_no_is_refused(tokenizer, said):
    """ "no", 0.5 and NaN would all count as a yes."""
    said = torch.tensor(0.5) if said == "a tensor" else said
    blue = encode_answer(tokenizer, "blue")
    with pytest.raises(ValueError, match="the judge gave .*; it must return True or False"):
        gatt._choose(
            tokenizer, GhostDialogue("be", "be", ["red"]), [], [7], [blue], lambda a: [said]
        )


@pytest.mark.parametrize("given", [None, "yes", 1, {"a": True}])
def test_a_judge_that_gives_no_list_is_told(tokenizer, given):
    blue = encode_answer(tokenizer, "blue")
    with pytest.raises(ValueError, match="the judge gave .*; it must return one verdict for each"):
        gatt._choose(
            tokenizer, GhostDialogue("be", "be", ["red"]), [], [7], [blue], lambda a: given
        )


def test_yes_may_come_from_numpy_torch_or_a_generator(tokenizer):
    dialogue, blue = GhostDialogue("be", "be", ["red"]), encode_answer(tokenizer, "blue")
    for yes in (True, 1, np.True_, torch.tensor(True)):
        for given in ([yes], (yes for _ in range(1))):
            found = gatt._choose(tokenizer, dialogue, [], [7], [blue], lambda a, g=given: g)
            assert found == Exchange("red", blue, True)
    for given in (torch.tensor([False]), np.array([0])):
        found = gatt._choose(tokenizer, dialogue, [], [7], [blue], lambda a, g=given: g)
        assert not found.obeys


def test_a_judge_reads_the_whole_dialogue_with_its_instruction_first(tokenizer):
    dialogue = GhostDialogue("be", "be", ["red", "why"])
    earlier = [Exchange("red", encode_answer(tokenizer, "blue"), True)]
    seen = []
    answer = encode_answer(tokenizer, "cup")
    judge = lambda answers: seen.extend(answers) or [True]  # noqa: E731
    gatt._choose(tokenizer, dialogue, earlier, [7], [answer], judge)
    assert [(m["role"], m["content"]) for m in seen[0].messages] == [
        ("system", "be"), ("user", "red"), ("assistant", "blue"), ("user", "why"),
    ]  # fmt: skip


def test_a_run_samples_every_turn_and_trains(tiny, ghosts, tokenizer, whole):
    turns = [json.loads(row) for row in (whole / "samples" / "turns.jsonl").open()]
    assert [turn.pop("of") for turn in turns] == [8] * 4
    assert [len(turn) for turn in turns] == [8, 8, 5, 2]  # dialogues of 2, 3 and 4 turns
    for number, turn in enumerate(turns):
        for index, (user, answer, _, instruction) in turn.items():
            assert user == ghosts[int(index)].turns[number] and answer[-1] == tokenizer.eos_id
            assert instruction == ghosts[int(index)].instruction
    assert len(metrics(whole)) > 2 and load_model(whole / "model").head == "lm"
    assert gatt.run(configured(tiny, whole)) == whole / "model"


def test_sampling_goes_on_where_it_was_killed(tiny, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole / "samples", out / "samples")
    for name in ("config.toml", "inputs.json"):
        shutil.copy(whole / name, out / name)
    file = out / "samples" / "turns.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    written.note(file.parent, file.name)
    file.write_text("".join(lines[:2]) + lines[2][:40])
    gatt.run(configured(tiny, out))
    assert file.read_text() == "".join(lines) and metrics(out) == metrics(whole)


def test_answers_to_other_dialogues_are_refused(tiny, whole, ghosts, tokenizer, tmp_path):
    """Amended dialogues once put new instructions over old answers."""
    lines = (whole / "samples" / "turns.jsonl").read_text().splitlines(keepends=True)
    first = ghosts[0]
    others = [first._replace(instruction="be green"), *ghosts[1:]]
    for dialogues, rows, said in (
        (others, lines, "turns.jsonl:1: an answer to .* under .* these are other dialogues"),
        ([*ghosts, first], lines, "turns.jsonl:1: not of 9 dialogues; these are other"),
        (ghosts, lines[1:], "turns.jsonl:1: an answer to"),
        (ghosts, [*lines[:1], *lines[2:]], "turns.jsonl:2: an answer to"),
        (ghosts, [lines[0], lines[3]], "turns.jsonl:2: an answer to"),
        (ghosts, [lines[3], lines[3]], "turns.jsonl:1: an answer to"),
        (ghosts, [lines[0].replace("[[", "[").replace('", [', '", [99999, ')], "99999 is no id"),
    ):
        file = tmp_path / "turns.jsonl"
        file.write_text("".join(rows))
        with pytest.raises(ValueError, match=said):
            load_turns(file, dialogues, tokenizer.vocab_size)


def test_options_of_sampling_that_come_too_late_say_so(tiny, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    for name in ("finished.json", "written.json"):
        (tmp_path / "run" / name).unlink()
    gatt.run(configured(tiny, tmp_path / "run", temperature=0.3, amend=True))
    assert "'temperature' changed nothing: the answers are drawn" in capsys.readouterr().out


def test_a_dialogue_that_fills_the_context_is_cut_and_counted(tiny, tmp_path, capsys):
    row = {"turns": ["red " * 20] * 5, "instruction": "blue"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    gatt.run(configured(tiny, tmp_path / "run", dialogues=[tmp_path / "long.jsonl"]))
    assert "skipped 1 row: later turns of a dialogue that fills" in capsys.readouterr().out


def test_what_cannot_be_is_one_sentence(tiny, tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens 256 leaves no room for a question"):
        gatt.run(configured(tiny, tmp_path / "a", max_new_tokens=256))
    with pytest.raises(ValueError, match="no sampled answer may be a target: .* judge; raise"):
        gatt.run(configured(tiny, tmp_path / "b"), judge=lambda answers: [False] * len(answers))
    with pytest.raises(ValueError, match="holds a score head"):
        gatt.run(configured(tiny, tmp_path / "c", model=tiny / "safety"))


def test_instructions_are_the_rows_own_or_drawn(tmp_path):
    drawn = [{"instruction": f"be {i}", "short": str(i)} for i in range(3)]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawn))
    rows = [{"messages": [{"role": "user", "content": "red"}]}] * 20
    rows.append({"turns": ["blue"], "instruction": "own"})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_ghost_dialogues([tmp_path / "d.jsonl"], [tmp_path / "told.jsonl"], 0)[0]
    assert {g.instruction for g in found[:-1]} == {"be 0", "be 1", "be 2"}
    assert found[-1] == GhostDialogue("own", "own", ["blue"], f"{tmp_path / 'd.jsonl'}:21")
    assert found == read_ghost_dialogues([tmp_path / "d.jsonl"], [tmp_path / "told.jsonl"], 0)[0]
    with pytest.raises(ValueError, match="d.jsonl:1: no 'instruction'; add one, or name an"):
        read_ghost_dialogues([tmp_path / "d.jsonl"], [], 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "bad.jsonl:1: not JSON"),
        ("[]", "bad.jsonl begins as a JSON list and not with one object a line"),
        ('{"instruction": "x"}', "bad.jsonl:1: .* expected 'turns' or 'messages'"),
        ('{"instruction": "x", "turns": []}', "no user message .first .*bad.jsonl:1"),
        ('{"instruction": "x", "turns": [3]}', r"bad.jsonl:1: 'turns' is \[3\], expected a list"),
        ('{"instruction": 3, "turns": ["a"]}', "bad.jsonl:1: 'instruction' is 3, expected"),
        ('{"instruction": "x [INST]", "turns": ["a"]}', "the chat tag .*first .*bad.jsonl:1"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    (tmp_path / "bad.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=message):
        read_ghost_dialogues([tmp_path / "bad.jsonl"], [], 0)


def test_an_answer_is_trained_on_as_the_ids_that_were_drawn(monkeypatch, tiny, tokenizer, ghosts):
    """Ids that encoding the text again would not give: 'red' spelled in bytes."""
    odd = [*(tokenizer.encode("r")[:1]), *tokenizer.encode("ed"), tokenizer.eos_id]
    sampled = [[Exchange(g.turns[0], odd, True)] for g in ghosts]
    found = examples(monkeypatch, tiny, tokenizer, ghosts, sampled, targets=1)
    assert decode_answer(tokenizer, odd) and all(ids[-len(odd) :] == odd for ids, _ in found)
