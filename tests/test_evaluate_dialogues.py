"""Whether chat models keep an instruction over many turns, by a function and by people.
Run: python -m pytest tests/test_evaluate_dialogues.py -q"""

import json

import pytest

from puna.core.text.chat import decode_answer, encode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.ghost import GhostDialogue, read_ghost_dialogues
from puna.trainers.evaluation import chat, dialogues
from puna.trainers.evaluation.config import EvaluateChatConfig
from puna.trainers.rl.rounds import Waiting


def configured(tiny, out, **options) -> EvaluateChatConfig:
    values = {"model": [tiny / "chat"], "max_new_tokens": 10, "chunk": 5, "device": "cpu"}
    return EvaluateChatConfig(out=out, **(values | options))


def rows_of(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_instruction_stands_in_the_first_message_alone(tiny):
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    ghost = GhostDialogue("be red", "red", ["cup", "tree", "moon"])
    answers = [encode_answer(tokenizer, "fish"), encode_answer(tokenizer, "old lamp")[:-1]]
    messages = [{"role": "system", "content": "be red"}]
    for turn, text in zip(ghost.turns, ("fish", "old lamp"), strict=False):
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": text})
    messages.append({"role": "user", "content": "moon"})
    expected = encode_prompt(tokenizer, messages)
    assert dialogues.context_of(tokenizer, ghost, answers) == expected
    said = [[answers[0]], [answers[1]], [[]]]
    given, turns = dialogues.answers_to_judge([ghost], said, tokenizer)
    assert turns == [1, 2] and [a.text for a in given] == ["fish", "old lamp"]
    assert given[1].messages == messages[:-2]


def test_shares_by_answer():
    ghosts = [GhostDialogue("a", "a", ["q"] * n) for n in (3, 3, 2)]
    rows = dialogues.by_turn(ghosts, [1, 2, 1, 2, 3, 1], [True, False, True, True, True, False])
    assert [row["answer"] for row in rows] == [1, 2, 3]
    assert [row["kept"]["share"] for row in rows] == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert [row["kept"]["pairs"] for row in rows] == [3, 3, 2]


def test_instructions_kept_by_a_function_and_by_a_file(tiny, tmp_path):
    """Both see the same answers; one turn after the other goes on from where a kill left it."""

    def keeps(answers):
        assert all(answer.messages[0]["role"] == "system" for answer in answers)
        return [len(answer.text) % 2 == 0 for answer in answers]

    data = {"dialogues": [tiny / "ghosts.jsonl"], "model": [tiny / "chat", tiny / "lm"]}
    config = configured(tiny, tmp_path / "run", **data)
    found = chat.run(config, keeps=keeps)["instruction_kept"]
    ghosts, _ = read_ghost_dialogues([tiny / "ghosts.jsonl"], [], 0)
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    said = rows_of(config.out / "answers/model-1-dialogues.jsonl")
    for turn in range(4):
        here = [i for i, ghost in enumerate(ghosts) if len(ghost.turns) > turn]
        spoken = [decode_answer(tokenizer, said[turn]["answers"][i]) for i in here]
        share = sum(bool(text) and len(text) % 2 == 0 for text in spoken) / len(here)
        assert found[str(tiny / "chat")][turn]["kept"]["share"] == pytest.approx(share)
    assert (config.out / "instruction-kept.svg").read_text().count("</svg>") == 1
    judged = tmp_path / "kept.jsonl"
    config = configured(tiny, tmp_path / "people", kept=judged, **data)
    with pytest.raises(Waiting, match=r"dialogues.jsonl waits to be judged: .* to .*kept.jsonl"):
        chat.run(config)
    rows = rows_of(config.out / "dialogues.jsonl")
    assert rows[0]["messages"][-1]["role"] == "user" and rows[0]["instruction"]
    verdicts = [{"answer": r["answer"], "kept": len(r["text"]) % 2 == 0} for r in rows]
    write(judged, verdicts[::-1])
    file = config.out / "answers/model-1-dialogues.jsonl"
    whole = file.read_bytes()
    file.unlink()
    assert chat.run(config)["instruction_kept"] == found and file.read_bytes() == whole
    write(judged, verdicts[1:])
    with pytest.raises(ValueError, match="no judgement of .*, the first is answer 0"):
        chat.run(config)
    other = [row | {"kept": not row["kept"]} for row in verdicts]
    write(judged, [*verdicts, *other, *verdicts])  # two of three
    assert chat.run(config)["instruction_kept"] == found
    write(judged, [verdicts[0] | {"answer": 9999}])
    with pytest.raises(ValueError, match=r"kept.jsonl:1: answer 9999; expected one from 0 to"):
        chat.run(config)
