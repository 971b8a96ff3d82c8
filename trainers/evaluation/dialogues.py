"""Whether an instruction is kept over many turns, though it stands in the first message alone
(paper section 3.3: "100% up to 20 turns" after Ghost Attention)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from puna.core import parallel
from puna.core.checkpoint.folder import tokenizer_path
from puna.core.documents import are_ids, count_of, field, json_rows, shortened
from puna.core.generation.memory import Memory
from puna.core.model import Transformer
from puna.core.text.chat import decode_answer, encode_turn
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.ghost import GhostDialogue
from puna.trainers.evaluation.answers import kept_in
from puna.trainers.evaluation.config import EvaluateChatConfig, policies
from puna.trainers.gatt import dialogue_so_far
from puna.trainers.rl.accuracy import wilson
from puna.trainers.rl.comparisons import write_rows
from puna.trainers.rl.config import engine_of
from puna.trainers.rl.engine import Engine
from puna.trainers.rl.exchanges import Exchange
from puna.trainers.rl.judges import Judge, judged
from puna.trainers.rl.rewards import Answer
from puna.trainers.rl.rollout import at_hand, sample_everywhere
from puna.trainers.train import written
from puna.trainers.train.interrupts import stop_requests
from puna.trainers.train.progress import meter

Said = list[list[list[int]]]
"""Turn -> dialogue -> ids of the answer; empty where there is none"""


def talk(
    config: EvaluateChatConfig,
    number: int,
    policy: Transformer,
    dialogues: Sequence[GhostDialogue],
) -> None:
    """The missing answers of chat model `number`, turn by turn, all dialogues side by side."""
    path = kept_in(config, number, "dialogues")
    tokenizer = Tokenizer(tokenizer_path(policies(config)[number]))
    parallel.on_main(lambda: path.parent.mkdir(exist_ok=True))
    said = parallel.on_main(lambda: read_said(path, dialogues))
    longest = max(len(dialogue.turns) for dialogue in dialogues)
    options: dict[str, Any] = {
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "memory": Memory(),
        "engine": engine_of(config, tokenizer),
        "chunk": config.chunk,
        **config.limits(),
    }
    bar = meter("dialogues", longest, start=len(said), unit="answers", show=parallel.is_main())
    with bar as progress, stop_requests(path) as stop, at_hand(policy, options["engine"]) as whole:

        def look() -> None:
            if stop():
                raise SystemExit(
                    f"stopped after turn {len(said)}; the same command continues {config.out}"
                )

        while len(said) < longest:
            said.append(next_turn(whole, tokenizer, dialogues, said, look=look, **options))
            if parallel.is_main():
                write_rows(path, [{"dialogues": len(dialogues), "answers": row} for row in said])
                written.note(path.parent, path.name)
            progress.advance(sum(map(bool, said[-1])))
            look()  # after the last one, too: more may follow


def next_turn(
    policy: Transformer,
    tokenizer: Tokenizer,
    dialogues: Sequence[GhostDialogue],
    said: Said,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    memory: Memory,
    engine: Engine | None = None,
    chunk: int = 0,
    look: Callable[[], None] = lambda: None,
    **limits: int,
) -> list[list[int]]:
    """The answer of each dialogue to its next message; none where it has no further one, or is
    longer than the context: a model that never stops fills that. `memory` is the dialogues' own;
    `look` is called after each `chunk` of answers but the last, as `sample_everywhere` does."""
    turn = len(said)
    contexts = {
        i: context_of(tokenizer, dialogue, [row[i] for row in said])
        for i, dialogue in enumerate(dialogues)
        if turn < len(dialogue.turns) and all(row[i] for row in said)
    }
    going = [i for i, ids in contexts.items() if len(ids) < policy.config.context]
    drawn = sample_everywhere(
        policy,
        [contexts[i] for i in going],
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_ids,
        temperature=temperature,
        seed=seed,
        round_index=turn,
        prompt_ids=going,
        sample_ids=[0] * len(going),
        memory=memory,
        engine=engine,
        chunk=chunk,
        look=look,
        called="the chat model",
        **limits,
    )
    answers = dict(zip(going, drawn, strict=True))
    return [answers.get(i, []) for i in range(len(dialogues))]


def context_of(
    tokenizer: Tokenizer, dialogue: GhostDialogue, answers: Sequence[list[int]]
) -> list[int]:
    """Ids of the dialogue so far and of its next message; the instruction is in the first alone.
    An answer that was cut off is given an end."""
    ids: list[int] = []
    for turn, user in enumerate(dialogue.turns[: len(answers) + 1]):
        told = dialogue.instruction if turn == 0 else ""
        ids += encode_turn(tokenizer, user, told, later=turn > 0)
        if turn < len(answers):
            ids += answers[turn]
            ids += [] if answers[turn][-1] in tokenizer.eos_ids else [tokenizer.eos_id]
    return ids


def read_said(path: Path, dialogues: Sequence[GhostDialogue]) -> Said:
    """The turns that are there; ValueError as `file:line: ...` for what is none of these."""
    if not path.exists():
        return []
    written.check(path.parent, path.name)
    said: Said = []
    for where, row in json_rows(path):
        answers = row.get("answers")
        if (
            not isinstance(answers, list)
            or len(answers) != len(dialogues)
            or not all(isinstance(ids, list) and are_ids(ids) for ids in answers)
        ):
            raise ValueError(
                f"{where}: {shortened(answers)} are no answers to "
                f"{count_of(len(dialogues), 'dialogue')}; "
                "remove the file to draw anew"
            )
        said.append(answers)
    return said


def answers_to_judge(
    dialogues: Sequence[GhostDialogue], said: Said, tokenizer: Tokenizer
) -> tuple[list[Answer], list[int]]:
    """Every answer that says something, its dialogue so far with the instruction first; and which
    answer of its dialogue it is, from 1."""
    answers: list[Answer] = []
    turns: list[int] = []
    for i, dialogue in enumerate(dialogues):
        history: list[Exchange] = []
        for turn, user in enumerate(dialogue.turns[: len(said)]):
            ids = said[turn][i]
            if not ids:
                break
            messages = dialogue_so_far(tokenizer, dialogue, history)
            text = decode_answer(tokenizer, ids)
            answers.append(Answer(messages, text, [], ids, ids[-1] in tokenizer.eos_ids))
            turns.append(turn + 1)
            history.append(Exchange(user, ids, True))
    return answers, turns


def by_turn(
    dialogues: Sequence[GhostDialogue], turns: Sequence[int], kept: Sequence[bool]
) -> list[dict[str, Any]]:
    """Rows {"answer", "kept"} with the share of dialogues whose answer of that number keeps the
    instruction, of those that have so many turns: one that the model filled before does not."""
    hits = torch.zeros(max(len(dialogue.turns) for dialogue in dialogues))
    for turn, each in zip(turns, kept, strict=True):
        hits[turn - 1] += each
    asked = [sum(len(d.turns) > turn for d in dialogues) for turn in range(len(hits))]
    return [
        {"answer": turn, "kept": wilson(count, dialogues_asked)._asdict()}
        for turn, (count, dialogues_asked) in enumerate(zip(hits.tolist(), asked, strict=True), 1)
    ]


def by_judge(answers: Sequence[Answer], keeps: Judge) -> list[bool]:
    """What a function says of each answer; an empty one keeps nothing, and is not asked about."""
    asked = [answer for answer in answers if answer.text]
    said = iter(parallel.on_main(lambda: judged(keeps, asked)) if asked else [])
    return [bool(answer.text) and next(said) for answer in answers]


def write_answers(path: Path, models: Sequence[Sequence[Answer]]) -> None:
    """The answers of all models for people to judge: `answer` is a number."""
    rows: list[dict[str, Any]] = []
    for answers in models:
        for answer in answers:
            if answer.text:
                instruction, *messages = answer.messages
                rows.append(
                    {
                        "answer": len(rows),
                        "instruction": instruction["content"],
                        "messages": messages,
                        "text": answer.text,
                    }
                )
    write_rows(path, rows)


def by_judgements(path: Path, models: Sequence[Sequence[Answer]]) -> list[list[bool]]:
    """As `by_judge` for each model, of a file's rows of `answer` and `kept`.

    Where an answer is judged several times, it keeps the instruction if more of them say so than
    not. ValueError as `file:line: ...` for another row, and where an answer is judged by nobody.
    """
    count = sum(bool(answer.text) for answers in models for answer in answers)
    votes: list[list[bool]] = [[] for _ in range(count)]
    for where, row in json_rows(path):
        try:
            number, kept = field(row, "answer", int), field(row, "kept", bool)
        except ValueError as error:
            raise ValueError(f"{where}: not a judgement: {error}") from error
        if not 0 <= number < count:
            raise ValueError(f"{where}: answer {number}; expected one from 0 to {count - 1}")
        votes[number].append(kept)
    if missing := [number for number, said in enumerate(votes) if not said]:
        raise ValueError(
            f"{path}: no judgement of {len(missing):,} of {count_of(count, 'answer')}, the first "
            f"is answer {missing[0]}; judge all of them"
        )
    given = (2 * sum(said) > len(said) for said in votes)
    return [[bool(answer.text) and next(given) for answer in answers] for answers in models]
