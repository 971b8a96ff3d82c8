"""What a user's rows hold is read in one way, used or named; what is wrong has file and line."""

import dataclasses
import errno
import importlib
import json
import re
import typing
from pathlib import Path

import pytest

from puna.cli.main import VERBS
from puna.core.documents import json_rows
from puna.core.text.chat import encode_dialogue
from puna.core.text.tokenizer import Tokenizer
from puna.demo import pipeline
from puna.demo.kept import kept, seconds
from puna.trainers import reward, sft
from puna.trainers.data.columns import ReadingMessages
from puna.trainers.data.formats import Columns, Malformed, parse_dialogue
from puna.trainers.data.ghost import GhostDialogue, read_ghost_dialogues
from puna.trainers.data.packing import Pair, encode_pairs, unlabelled
from puna.trainers.data.prompts import load_prompts
from puna.trainers.data.readers import (
    read_answered,
    read_dialogues,
    read_preferences,
    read_preprompts,
    read_prompts,
    read_texts,
)
from puna.trainers.evaluation import dialogues, wins
from puna.trainers.rl import exchanges
from puna.trainers.rl.best_of import read_samples, write_samples
from puna.trainers.rl.comparisons import read_pairs
from puna.trainers.rl.early_stopping import history
from puna.trainers.rl.rewards import Answer
from puna.trainers.rl.rounds import record
from puna.trainers.train.arguments import several_valued
from puna.trainers.train.config import parse

LINE = "\N{LINE SEPARATOR}"
USER = {"role": "user", "content": "red"}
ANSWER = {"role": "assistant", "content": "blue cup"}
SAMPLE = {
    "messages": [USER], "is_safety": False, "answer": "a", "tokens": [3, 2], "finished": True,
    "score": 1.0, "scores": {"helpfulness": 1}, "round": 1, "prompt": 0, "sample": 0,
}  # fmt: skip
PAIR = {"messages": [USER], "is_safety": False, "a": "x", "b": "y", "a_ids": [3], "b_ids": [4]}

# Every reader of JSON lines, with a row that it takes.
ASKED = GhostDialogue("a", "a", [f"b{LINE}\x85"] * 2)
MATCH = wins.Match([{"answer": "a"}], [{"answer": "b"}], [False], [0])
REPLY = Answer([USER], "red")
READERS = {
    "texts": (read_texts, {"text": "red"}),
    "dialogues": (read_dialogues, {"messages": [USER, ANSWER]}),
    "preferences": (read_preferences, {"prompt": "q", "chosen": "a", "rejected": "b"}),
    "prompts": (read_prompts, {"prompt": "q"}),
    "answered": (read_answered, {"prompt": "q", "response": "a", "safety": True}),
    "preprompts": (read_preprompts, {"preprompt": "q", "category": "c"}),
    "ghosts": (
        lambda path: read_ghost_dialogues([path], [], 0),
        {"turns": ["a"], "instruction": "b"},
    ),
    "samples": (lambda path: (read_samples(path), None), SAMPLE),
    "pairs": (lambda path: (read_pairs(path), None), PAIR),
    "winners": (
        lambda path: (wins.by_judgements(path, [MATCH]) and None, None),
        {"pair": 0, "winner": "a"},
    ),
    "kept": (
        lambda path: (dialogues.by_judgements(path, [[REPLY]]) and None, None),
        {"answer": 0, "kept": True},
    ),
    "said": (lambda path: (dialogues.read_said(path, [ASKED]), None), {"answers": [[3, 2]]}),
    "metrics": (lambda path: (history(path), None), {"step": 1}),
    "rounds": (
        lambda path: (record(path, 9, {"rejection": path}, {}, {}, {}), None),
        {"version": 1},
    ),
    "turns": (
        lambda path: (exchanges.load_turns(path, [ASKED], 9)[0], None),
        {"of": 1, "0": [f"b{LINE}\x85", [3, 2], True, "a"]},
    ),
}


def lines(path: Path, *rows: object, **options) -> Path:
    path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_takes_the_same_files(kind: str, tmp_path: Path) -> None:
    """A byte order mark, blank lines, carriage returns, no last line feed, and separators of lines
    inside of strings, which are not ends of lines."""
    read, row = READERS[kind]
    text = json.dumps(row | {"extra": f"a{LINE}b\x85c"}, ensure_ascii=False)
    if kind == "turns":  # a row has nothing but answers
        text = json.dumps(row, ensure_ascii=False)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\n  \n{text}".encode())
    rows, _ = read(file)
    assert rows is None or len(rows) == 2


BROKEN = {
    "bytes": (b'{"a": "\xff"}', "not UTF-8, expected UTF-8 text"),
    "latin 1": ('{"a": "Très"}'.encode("latin-1"), "not UTF-8, expected UTF-8 text"),
    "deep": (b"[" * 100_000, "the JSON is nested too deeply"),
    "digits": (b'{"a": 1' + b"0" * 5000 + b"}", "a number has more than 4,300 digits"),
    "cut": (b'{"a": 1', "not JSON .*column 8"),
    "list": (b"[1]", "a JSON list, expected one object a line"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("harm", BROKEN)
def test_every_reader_names_file_and_line(kind: str, harm: str, tmp_path: Path) -> None:
    read, row = READERS[kind]
    data, message = BROKEN[harm]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(row).encode() + b"\n\n" + data + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:3: {message}") as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_u2028_in_a_prompt_reaches_the_tokenizer(tiny: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "p.jsonl", {"prompt": f"red{LINE}cup"}, {"prompt": "blue"})
    prompts, _ = load_prompts([file], Tokenizer(tiny / "tokenizer.model"), 200)
    assert [prompt.messages[0]["content"] for prompt in prompts] == [f"red{LINE}cup", "blue"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["a"]}, r"rows.jsonl:2: tokens is \[\"a\"\], expected ids"),
        ({"tokens": []}, r"rows.jsonl:2: tokens is \[\], expected ids"),
        ({"tokens": [-1]}, r"rows.jsonl:2: tokens is \[-1\], expected ids"),
        ({"tokens": [2**40]}, "rows.jsonl:2: tokens is .*expected ids"),
        ({"tokens": [True]}, "rows.jsonl:2: tokens is .*expected ids"),
        ({"tokens": 3}, "rows.jsonl:2: tokens is 3, expected a list"),
        ({"score": float("nan")}, "rows.jsonl:2: score is NaN, expected a finite number"),
        ({"scores": {"helpfulness": "x"}}, 'rows.jsonl:2: helpfulness is "x", expected'),
        ({"finished": 1}, "rows.jsonl:2: finished is 1, expected true or false"),
        ({"messages": "x"}, "rows.jsonl:2: 'messages' is|rows.jsonl:2: messages is"),
        ({"messages": [3]}, r"rows.jsonl:2: 'messages\[0\]' is 3"),
        ({"answer": None}, "rows.jsonl:2: answer is null, expected a text"),
    ],
)
def test_a_row_that_is_no_sample(changes: dict, message: str, tmp_path: Path) -> None:
    write_samples(tmp_path / "rows.jsonl", [SAMPLE, SAMPLE | changes], "w")
    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"7": ["b", [2], True, "a"]}, 'rows.jsonl:1: an answer to dialogue "7" of 1; these are'),
        ({"x": ["b", [2], True, "a"]}, 'rows.jsonl:1: an answer to dialogue "x" of 1'),
        ({"0": ["b", ["x"], True, "a"]}, "rows.jsonl:1: .* is no exchange; remove"),
        ({"0": ["b", [2], True]}, "rows.jsonl:1: .* is no exchange"),
        ({"0": ["b", [2]]}, "rows.jsonl:1: .* is no exchange"),
        ({"0": 3}, "rows.jsonl:1: 3 is no exchange"),
    ],
)
def test_a_row_that_is_no_turn(row: dict, message: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "rows.jsonl", {"of": 1, **row})
    with pytest.raises(ValueError, match=message):
        exchanges.load_turns(file, [GhostDialogue("a", "a", ["b"])], 9)


def test_a_pair_that_is_none(tmp_path: Path) -> None:
    file = lines(tmp_path / "rows.jsonl", PAIR, PAIR | {"b_ids": ["x"]})
    with pytest.raises(ValueError, match=r"rows.jsonl:2: not a pair of answers: b_ids is \[.x.\]"):
        read_pairs(file)


# --- what is left out has a place


def test_over_long_rows_are_named_by_file_and_line(tiny: Path, tmp_path: Path, capsys) -> None:
    """Not by their number among the rows that can be used."""
    tokenizer, long = Tokenizer(tiny / "tokenizer.model"), "red " * 300
    short = [{"prompt": f"red {n}", "response": "blue"} for n in range(9)]
    dialogues = [{"messages": [USER]}] * 5 + short + [{"prompt": long, "response": "x"}] + short
    file = lines(tmp_path / "d.jsonl", *dialogues)
    learned, _ = read_dialogues(file)
    assert sft.pack(tokenizer, learned, 128).skipped.first.popitem()[1] == f"{file}:15"
    rows = [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 5
    rows += [{"prompt": f"q {n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    rows += [{"prompt": "q", "chosen": long, "rejected": "b"}]
    file = lines(tmp_path / "p.jsonl", *rows)
    _, skipped = encode_pairs(tokenizer, read_preferences(file)[0], 128)
    assert skipped.first.popitem()[1] == f"{file}:15"
    file = lines(tmp_path / "q.jsonl", *[{"prompt": " "}] * 5, {"prompt": long}, {"prompt": "q"})
    _, skipped = load_prompts([file], tokenizer, 128)
    assert skipped.first["longer than 128 tokens"] == f"{file}:6"


def test_a_held_out_row_that_is_too_long_stops_nobody(tiny: Path, tmp_path: Path, capsys) -> None:
    """Wherever the one long row of 50 falls, in what is learned or in what is held out."""
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    rows = [{"prompt": f"red {n}", "response": "blue"} for n in range(7)]
    rows.insert(3, {"prompt": "red " * 300, "response": "x"})
    learned, skipped = read_dialogues(lines(tmp_path / "d.jsonl", *rows))
    held = sft.pack_held_out(tokenizer, learned, 128, skipped)
    assert held is not None
    place = f"(first {tmp_path / 'd.jsonl'}:4)"
    reason = "held out, and longer than the 128 tokens of a row"
    assert str(skipped) == f"skipped 1 row: {reason} {place}"
    assert sft.pack_held_out(tokenizer, learned[3:4], 128, skipped) is None
    assert "the held-out loss is not measured: no sequence" in str(skipped)
    model = sft.run(
        sft.SFTConfig(
            model=tiny / "lm", data=[tmp_path / "d.jsonl"], out=tmp_path / "run", epochs=1,
            batch=2, eval_data=[lines(tmp_path / "e.jsonl", rows[3])], row_tokens=128, device="cpu",
        )
    )  # fmt: skip
    assert model.is_dir() and "the held-out loss is not measured" in capsys.readouterr().out


def test_a_held_out_pair_that_is_too_long_stops_nobody(tiny: Path, tmp_path: Path, capsys) -> None:
    rows: list[dict] = [
        {"prompt": f"red {n}", "chosen": "blue", "rejected": "cup"} for n in range(6)
    ]
    rows[0]["safety"] = "both_safe"
    long = {"prompt": "q", "chosen": "red " * 400, "rejected": "b"}
    config = reward.RewardConfig(
        model=tiny / "lm", data=[lines(tmp_path / "d.jsonl", *rows)], out=tmp_path / "run",
        eval_data=[lines(tmp_path / "e.jsonl", long)], batch=2, device="cpu", margin="large",
        safety_weight=0.5,
    )  # fmt: skip
    reward.run(config)
    said = capsys.readouterr().out
    assert "held out, and longer than the context of 256 tokens" in said
    assert "the held-out accuracy is not measured" in said
    assert "no rating in 6 of 6 pairs: there the margin is 0" in said
    assert "no safety label in 5 of 6 pairs: there safety_weight = 0.5 does nothing" in said


def test_options_without_labels_are_said() -> None:
    pairs = [Pair([1], [2], "better"), Pair([1], [2], None, "both_safe")]
    assert len(unlabelled(pairs, "small", 0.1)) == 2
    assert unlabelled(pairs[:1], "large", 0.0) == unlabelled(pairs, "none", 0.0) == []
    assert "no rating in 1 of 2 pairs" in unlabelled(pairs, "large", 0.0)[0]


# --- what is read is used


def test_columns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    row = {"instruction": "q", "input": "the cat", "output": "a", "id": 3}
    file = lines(tmp_path / "d.jsonl", row, row, row | {"more": 1})
    columns = Columns(prompt="instruction", response="output")
    _, skipped = read_dialogues(file, ReadingMessages(columns=columns))
    assert str(skipped) == (
        f"{file}: the columns 'input', 'id', 'more' are not used; a recipe's [columns], where the "
        "command has them, maps what belongs to a row"
    )
    both = {"messages": [USER, ANSWER], "prompt": "q", "response": "a"}
    _, skipped = read_dialogues(lines(tmp_path / "b.jsonl", both))
    assert "the columns 'prompt', 'response' are not used" in str(skipped)
    one = {"prompt": "q", "chosen": "a", "rejected": "b", "week": 3}
    _, skipped = read_preferences(lines(tmp_path / "p.jsonl", one))
    assert "the column 'week' is not used" in str(skipped)
    for path, read in (("t.jsonl", read_texts), ("q.jsonl", read_prompts)):
        row = {"text": "a"} if path == "t.jsonl" else {"prompt": "q", "safety": True}
        assert not read(lines(tmp_path / path, row))[1]


def test_what_stands_inside_a_message_and_is_not_read_is_named(tmp_path: Path) -> None:
    user, answer = ({"role": role, "content": "red"} for role in ("user", "assistant"))
    rows = [{"messages": [user, answer | {"wieght": 0, "id": 7}]}, {"messages": [user, answer]}]
    _, skipped = read_dialogues(lines(tmp_path / "a.jsonl", *rows, rows[0]))
    assert "the columns 'messages[].wieght', 'messages[].id' are not used" in str(skipped)
    _, skipped = read_dialogues(
        lines(tmp_path / "b.jsonl", {"messages": [user, answer | {"weight": 1}]})
    )
    assert not skipped


def test_a_system_message_and_an_input_are_used_where_mapped() -> None:
    columns = Columns(system="system", input="input")
    row = {"system": "Be brief.", "prompt": "Repeat it.", "input": "the cat", "response": "cat"}
    assert [(m["role"], m["content"]) for m in parse_dialogue(row, columns).messages] == [
        ("system", "Be brief."),
        ("user", "Repeat it.\n\nthe cat"),
        ("assistant", "cat"),
    ]
    for empty in ("", " ", None):
        found = parse_dialogue(row | {"system": empty, "input": empty}, columns)
        assert [m["content"] for m in found.messages] == ["Repeat it.", "cat"]
    with pytest.raises(Malformed, match="'input' is 3, expected a string"):
        parse_dialogue(row | {"input": 3}, columns)


def test_weight_0_is_not_learned_from(tiny: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    wrong = {"role": "assistant", "content": "red red", "weight": 0}
    messages = [USER, wrong, USER, ANSWER | {"weight": 1}]
    plain = [{k: m[k] for k in ("role", "content")} for m in messages]
    (dialogue,), _ = read_dialogues(lines(tmp_path / "d.jsonl", {"messages": messages}))
    ids, weights = encode_dialogue(tokenizer, dialogue.messages)
    all_ids, all_weights = encode_dialogue(tokenizer, plain)
    first, _ = encode_dialogue(tokenizer, plain[:2])
    assert ids == all_ids
    assert weights == [0.0] * len(first) + all_weights[len(first) :]
    assert sum(all_weights[: len(first)]) > 0
    for weight in (2, -1, "0", True, float("nan")):
        with pytest.raises(Malformed, match=r"'messages\[1\]' has weight"):
            parse_dialogue({"messages": [USER, wrong | {"weight": weight}]}, Columns())
    (half,), _ = read_dialogues(lines(tmp_path / "n.jsonl", {"messages": messages[:2]}))
    with pytest.raises(ValueError, match="no token to learn .first .*n.jsonl:1"):
        sft.pack(tokenizer, [half], 128)


BESIDES = {"data": "--tokenizer", "prompts": "--out"}  # what such a list asks for besides
LISTS = [
    (verb, flag)
    for verb, (module, config, *_) in VERBS.items()
    for flag in sorted(several_valued(getattr(importlib.import_module(module), config)))
]


@pytest.mark.parametrize(("verb", "flag"), LISTS)
def test_a_list_takes_all_that_its_flag_is_given(verb: str, flag: str) -> None:
    cls = getattr(importlib.import_module(VERBS[verb].module), VERBS[verb].config)
    hint = typing.get_type_hints(cls)[flag]
    if typing.Any in typing.get_args(hint):
        pytest.skip("a recipe's table, which is no flag")
    inner = [each for each in typing.get_args(hint) if each is not Ellipsis]
    values = ["0.5", "0.6", "0.7"] if {int, float} & set(inner) else ["a", "b", "c"]
    option = "--" + flag.replace("_", "-")
    if typing.get_origin(hint) is dict:
        given, expected = [option, "a", "b", option, "c", "d"], {"a": "b", "c": "d"}
    else:
        given, expected = [option, values[0], values[1], f"{option}={values[2]}"], values
    required = [BESIDES.get(flag, "--prompt"), "x"] if verb in ("pretrain", "generate") else []
    for field in dataclasses.fields(cls):
        missing = dataclasses.MISSING
        if field.default is missing and field.default_factory is missing and field.name != flag:
            required += ["--" + field.name.replace("_", "-"), "x"]
    found = getattr(parse(cls, given + required, verb), flag)
    assert (found if isinstance(found, dict) else [str(each) for each in found]) == expected


def test_a_full_disk_is_named_by_its_file() -> None:
    full = Path("/dev/full")
    turn = {0: exchanges.Exchange("a", [2], True)}
    for write in (
        lambda: write_samples(full, [SAMPLE], "a"),
        lambda: exchanges.append_turn(full, turn, [ASKED]),
    ):
        with pytest.raises(
            OSError, match="^/dev/full could not be .* .No space left on device.; "
        ) as e:
            write()
        assert e.value.errno == errno.ENOSPC


def test_rows_know_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(json_rows(file)) == [(f"{file}:1", {"a": 1}), (f"{file}:3", {"a": 2})]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": "x"}', b"\xff"])
def test_a_damaged_file_of_the_demos_own_is_made_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_bytes(content)
    assert seconds(tmp_path) == {}
    demo = pipeline.Demo(pipeline.DemoConfig(out=tmp_path))
    demo.stage("data", lambda: None)
    assert list(seconds(tmp_path)) == ["data"] and demo.seconds() < 1
    (tmp_path / "persona.json").write_bytes(content)
    assert kept(tmp_path / "persona.json", list) == ([1] if content == b"[1]" else None)


def test_there_is_one_reader_of_json() -> None:
    """A file's JSON is parsed where its mistakes become sentences, and lines are not cut with
    `splitlines`, which takes U+2028 for an end of one."""
    root = Path(__file__).parents[1]
    own = {  # what a kill may have cut short, or what never was in a file
        "core/documents.py", "core/ranks.py", "core/checkpoint/hashes.py", "trainers/rl/chunks.py",
        "trainers/train/run.py", "trainers/train/state.py", "trainers/train/claim.py",
        "trainers/train/lock.py", "trainers/train/command.py", "trainers/train/written.py",
        "demo/report/results.py", "trainers/annotations/items.py",
    }  # fmt: skip
    rooms = ("core", "trainers", "demo", "annotate", "cli", "puna")
    files = [path for room in rooms for path in (root / room).rglob("*.py")]
    found = {
        str(path.relative_to(root))
        for path in files
        if re.search(r"json\.loads?\(|\.splitlines\(", path.read_text(encoding="utf-8"))
    }
    assert found <= own
