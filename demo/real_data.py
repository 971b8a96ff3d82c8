"""Whose comparisons become what in `puna demo real`: demonstrations, pairs, prompts, and what of
each is held out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from puna.core.documents import count_of, json_rows, listed
from puna.core.terminal import say
from puna.core.text.chat import encode_answer, encode_prompt
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import reward
from puna.trainers.data.files import sources
from puna.trainers.data.formats import Preference
from puna.trainers.data.split import split
from puna.trainers.rl.comparisons import write_rows

KINDS = {"helpfulness": "helpful", "safety": "harmless"}  # reward model -> its files' names
PAIRS = 150  # of each kind, trained on
HELD = 90  # of each kind, held out
LONGEST = 144  # tokens of a prompt with an answer, in a comparison
DEMONSTRATIONS = 90  # helpful answers for SFT, of comparisons that no reward model sees
DEMONSTRATION = 200  # longest of them, with its prompt, tokens
PROMPT = 64  # longest prompt that is answered in PPO, tokens


def files_of(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Reward model -> its files of comparisons; says which files are of neither."""
    names = {
        source.file: str(source.file.relative_to(path) if path.is_dir() else source.file.name)
        for path in paths
        for source in sources(path)
    }
    found = {
        kind: [file for file, name in names.items() if word in name.lower()]
        for kind, word in KINDS.items()
    }
    for kind, word in KINDS.items():
        if not found[kind]:
            raise ValueError(
                f'no file has "{word}" in its name, to train the {kind} model on: '
                f"{listed(names.values())}; name such a file so, or add one to --data"
            )
    if left := [name for file, name in names.items() if not any(file in f for f in found.values())]:
        say(f"not used: {listed(left)} (neither helpful nor harmless by name)")
    return found


def write_data(
    folder: Path,
    files: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
    *,
    seed: int,
    scale: float,
) -> dict[str, int]:
    """Write the files of `folder`, where it is not whole; returns file -> rows. `scale` is of the
    amounts above."""
    names = [f"{kind}{held}" for kind in KINDS for held in ("", "-held")]
    names += ["demonstrations", "demonstrations-held", "prompts", "prompts-held"]
    if not all((folder / f"{name}.jsonl").exists() for name in names):
        made: dict[str, list[Any]] = {}
        prompts: dict[str, dict[str, Any]] = {"": {}, "-held": {}}
        for number, (kind, paths) in enumerate(files.items()):
            teaching = scaled(scale, DEMONSTRATIONS, 2) if kind == "helpfulness" else 0
            shown, learned, held = shared_out(
                read_all(paths), tokenizer, (seed, number), scale, teaching
            )
            for part, side in ((learned, ""), (held, "-held")):
                made[kind + side] = [comparison(row) for row in part]
                asked = [row for row in part if prompt_size(tokenizer, row) <= PROMPT]
                prompts[side] |= {reward.begins(row): prompt(row, kind) for row in asked}
            if kind == "helpfulness":
                made["demonstrations"] = [dialogue(row) for row in shown]
                own = {reward.begins(row): dialogue(row) for row in held}
                made["demonstrations-held"] = [*own.values()]
        made["prompts"] = [*prompts[""].values()]
        seen = prompts["-held"].keys() - prompts[""].keys()
        made["prompts-held"] = [row for key, row in prompts["-held"].items() if key in seen]
        for name in names:
            if not made[name]:
                raise ValueError(
                    f"no row is left for {name}: prompts have at most {PROMPT} tokens, and no two "
                    "files of data/ share one; add short ones to --data"
                )
        for name in names:
            write_rows(folder / f"{name}.jsonl", made[name])
    counts = {name: sum(1 for _ in json_rows(folder / f"{name}.jsonl")) for name in names}
    say(f"\nrows: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    return counts


def read_all(paths: Sequence[Path]) -> list[Preference]:
    """The usable comparisons of the files; says what is skipped."""
    rows, skipped = reward.load_preferences(list(paths))
    if skipped:
        say(skipped)
    return rows


def shared_out(
    rows: Sequence[Preference],
    tokenizer: Tokenizer,
    seeds: tuple[int, int],
    scale: float,
    teaching: int,
) -> tuple[list[Preference], list[Preference], list[Preference]]:
    """(at most `teaching` to demonstrate, to compare, to compare and held out), in an order that
    `seeds` draw; what is compared has at most LONGEST tokens, and no prompt is in two of them.
    ValueError where there are fewer than four to compare.

    A reward model that starts from a model that has learned one of the two answers can tell it by
    that, and a held-out pair has no such sign.
    """
    wanted = scaled(scale, PAIRS, 6) + scaled(scale, HELD, 2)
    short: list[Preference] = []
    others: list[Preference] = []
    for index in np.random.default_rng(seeds).permutation(len(rows)).tolist():
        size = prompt_size(tokenizer, rows[index]) + answer_size(tokenizer, rows[index])
        if size <= LONGEST and len(short) < wanted:
            short.append(rows[index])
        elif size <= DEMONSTRATION:
            others.append(rows[index])
        if len(short) == wanted and len(others) >= 2 * teaching:  # some may share a prompt
            break
    spare = min(teaching, (len(short) + len(others)) // 4) - len(others)
    spare = max(0, spare)  # to give up where all of them are short
    short, others = short[: len(short) - spare], others + short[len(short) - spare :]
    taken = {reward.begins(row) for row in short}
    shown = [row for row in others if reward.begins(row) not in taken][:teaching]
    if len(short) < 4:
        kind = f"{[*KINDS.values()][seeds[1]]} comparison"
        raise ValueError(
            f"{count_of(len(short), kind)} of at most {LONGEST} tokens: too few to train on "
            "some and hold some out; add shorter ones to "
            "--data"
        )
    return shown, *split(short, HELD / (PAIRS + HELD), seeds[0], reward.begins)


def prompt_size(tokenizer: Tokenizer, row: Preference) -> int:
    """Tokens."""
    return len(encode_prompt(tokenizer, row.messages))


def answer_size(tokenizer: Tokenizer, row: Preference) -> int:
    """Tokens of the longer answer."""
    return max(len(encode_answer(tokenizer, text)) for text in (row.chosen, row.rejected))


def comparison(row: Preference) -> dict[str, Any]:
    return {"messages": row.messages, "chosen": row.chosen, "rejected": row.rejected}


def dialogue(row: Preference) -> dict[str, Any]:
    return {"messages": [*row.messages, {"role": "assistant", "content": row.chosen}]}


def prompt(row: Preference, kind: str) -> dict[str, Any]:
    return {"messages": row.messages, "safety": kind == "safety"}


def scaled(scale: float, count: int, least: int = 1) -> int:
    return max(least, round(count * scale))
