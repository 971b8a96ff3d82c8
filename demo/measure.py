"""What the demo measures: answers to held-out prompts, judged by the oracle, never by a reward
model."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from puna.core.attended import attention_to
from puna.core.checkpoint.atomic import write_text
from puna.core.checkpoint.folder import load_model, tokenizer_path
from puna.core.generation.generate import generate
from puna.core.generation.memory import Memory
from puna.core.model import Transformer
from puna.core.text.chat import Message, decode_answer, encode_answer, encode_prompt, encode_turn
from puna.core.text.tokenizer import Tokenizer
from puna.demo.kept import kept
from puna.demo.village import oracle
from puna.demo.village.world import MEASURED_TURNS, PersonaDialogue
from puna.trainers.data.ghost import GhostDialogue
from puna.trainers.evaluation.dialogues import Said, next_turn

MODES = {"t1": 1.0, "greedy": 0.0}
ANSWER_TOKENS = 48  # longest answer that is drawn; the world's are of 6 to 14 words


class HeldOut(NamedTuple):
    """Held-out prompts by what they measure; each a list of dialogues up to the user's turn."""

    win: list[list[Message]]  # of all kinds: compared with SFT's answers
    ordinary: list[list[Message]]
    unsafe: list[list[Message]]
    borderline: list[list[Message]]


def answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    temperature: float,
    seed: int,
    *,
    sample: int = 0,
) -> list[str]:
    """One answer a prompt, as text."""
    completions = generate(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=ANSWER_TOKENS,
        eos_id=tokenizer.eos_id,
        temperature=temperature,
        seed=seed,
        sample_ids=[sample] * len(prompts),
        batch_size=128,
    )
    return [decode_answer(tokenizer, completion.tokens) for completion in completions]


def answer_all(path: Path, held: HeldOut, seed: int, cache: Path) -> dict[str, Any]:
    """Answers of the model at `path`: mode -> kind of prompt -> texts; kept in `cache`."""
    if (before := kept(cache, dict)) is not None:
        return before
    model, tokenizer = load_model(path), Tokenizer(tokenizer_path(path))
    found = {
        mode: {
            kind: answers(model, tokenizer, prompts, temperature, seed)
            for kind, prompts in held._asdict().items()
        }
        for mode, temperature in MODES.items()
    }
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_text(cache, json.dumps(found))
    return found


def drawn_again(
    path: Path, prompts: Sequence[Sequence[Message]], seed: int, times: int, cache: Path
) -> list[list[str]]:
    """So many more answers to each prompt at temperature 1, each time with other random numbers
    than the times before and `answer_all`; kept in `cache`."""
    if (before := kept(cache, list)) is not None:
        return before
    model, tokenizer = load_model(path), Tokenizer(tokenizer_path(path))
    found = [answers(model, tokenizer, prompts, 1.0, seed, sample=1 + n) for n in range(times)]
    write_text(cache, json.dumps(found))
    return found


def rates(
    held: HeldOut, texts: dict[str, list[str]], baseline: dict[str, list[str]]
) -> dict[str, Any]:
    """The row of one version in one mode; `baseline` holds SFT's answers in the same mode."""
    wins = [
        oracle.better(prompt, mine, theirs)
        for prompt, mine, theirs in zip(held.win, texts["win"], baseline["win"], strict=True)
    ]
    mean, interval = mean_and_interval(wins)
    return {
        "win_rate_vs_sft": mean,
        "win_rate_ci95": interval,
        "violation_rate": share(oracle.violates, held.unsafe, texts["unsafe"]),
        "false_refusal_rate": share(oracle.falsely_refuses, held.ordinary, texts["ordinary"]),
        "borderline_refusal_rate": share(
            oracle.falsely_refuses, held.borderline, texts["borderline"]
        ),
        "helpful_rate": share(oracle.helpful, held.ordinary, texts["ordinary"]),
        "count": {kind: len(prompts) for kind, prompts in held._asdict().items()},
    }


def share(judge: Any, prompts: Sequence[Sequence[Message]], texts: Sequence[str]) -> float:
    """How often `judge(prompt, answer)` says yes."""
    return sum(judge(p, t) for p, t in zip(prompts, texts, strict=True)) / len(texts)


def mean_and_interval(values: Sequence[float]) -> tuple[float, list[float]]:
    """Mean and its 95% normal interval, cut to 0..1."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    half = 1.96 * math.sqrt(variance / len(values))
    return mean, [max(0.0, mean - half), min(1.0, mean + half)]


def dialogues_with(
    path: Path, dialogues: Sequence[PersonaDialogue], temperature: float, seed: int
) -> list[list[str]]:
    """The model's side of each persona dialogue, the instruction in the first message only; empty
    where a dialogue has filled the context."""
    model, tokenizer = load_model(path), Tokenizer(tokenizer_path(path))
    ghosts = [GhostDialogue(d.system, d.system, list(d.questions)) for d in dialogues]
    said: Said = []
    memory = Memory()
    for _ in range(max(len(ghost.turns) for ghost in ghosts)):
        row = next_turn(
            model,
            tokenizer,
            ghosts,
            said,
            temperature=temperature,
            max_new_tokens=ANSWER_TOKENS,
            seed=seed,
            memory=memory,
        )
        said.append(row)
    return [[decode_answer(tokenizer, row[i]) for row in said] for i in range(len(ghosts))]


def kept_by_turn(
    dialogues: Sequence[PersonaDialogue], said: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Share of dialogues whose answer at each measured turn keeps the instruction."""
    found = {}
    for turn in MEASURED_TURNS:
        kept = [
            oracle.keeps(d.instruction, d.questions[turn - 1], texts[turn - 1])
            for d, texts in zip(dialogues, said, strict=True)
            if len(texts) >= turn
        ]
        if kept:
            found[str(turn)] = sum(kept) / len(kept)
    return found


def attention_by_turn(
    path: Path, dialogues: Sequence[PersonaDialogue], said: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Fig. 10: `attention_of`, averaged over dialogues."""
    found = attention_of(path, dialogues, said)
    return {turn: sum(means) / len(means) for turn, means in found.items() if means}


def attention_of(
    path: Path, dialogues: Sequence[PersonaDialogue], said: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """How strongly each measured answer looks back at the instruction, which is in the first
    message alone: the largest weight of any head of any layer, averaged over the answer's tokens;
    by turn, one number for each dialogue that has come so far."""
    model, tokenizer = load_model(path), Tokenizer(tokenizer_path(path))
    found: dict[str, list[float]] = {str(turn): [] for turn in MEASURED_TURNS}
    for dialogue, texts in zip(dialogues, said, strict=True):
        ids: list[int] = []
        places: list[slice] = []
        for turn, (question, text) in enumerate(zip(dialogue.questions, texts, strict=True)):
            asked = encode_turn(tokenizer, question, dialogue.system if turn == 0 else "")
            answer = encode_answer(tokenizer, text) if text else [tokenizer.eos_id]
            places.append(slice(len(ids) + len(asked) - 1, len(ids) + len(asked + answer) - 1))
            ids += asked + answer
        told = instruction_in(tokenizer, dialogue)
        weights = attention_to(model, ids[: model.config.context], told)
        for turn in MEASURED_TURNS:
            seen = weights[places[turn - 1]]  # of the tokens that the answer's are predicted from
            found[str(turn)] += [float(seen.mean())] if len(seen) else []
    return found


def instruction_in(tokenizer: Tokenizer, dialogue: PersonaDialogue) -> slice:
    """Where the instruction stands among a dialogue's ids: what the first message has more with it
    than without."""
    told = encode_turn(tokenizer, dialogue.questions[0], dialogue.system)
    plain = encode_turn(tokenizer, dialogue.questions[0])
    start = next(i for i, (a, b) in enumerate(zip(told, plain, strict=False)) if a != b)
    return slice(start, start + len(told) - len(plain))


def calibration(differences: Sequence[float], bins: int = 10) -> list[list[float]]:
    """[predicted, observed, pairs] for bins of the predicted chance that the preferred answer
    wins. A pair is counted from both sides, since which one is called first is arbitrary."""
    chances = [1 / (1 + math.exp(-max(-30.0, min(30.0, d)))) for d in differences]
    sided = [(c, 1.0) for c in chances] + [(1 - c, 0.0) for c in chances]
    rows = []
    for index in range(bins):
        inside = [(c, y) for c, y in sided if min(int(c * bins), bins - 1) == index]
        if inside:
            predicted = sum(c for c, _ in inside) / len(inside)
            observed = sum(y for _, y in inside) / len(inside)
            rows.append([predicted, observed, float(len(inside))])
    return rows
