"""Ghost Attention: keep an instruction over many turns (paper section 3.3 and A.3.5).

1. Attach the instruction to every user message of a dialogue and sample the answers.
2. Keep it in the first user message only, shortened half of the time.
3. Fine-tune, with loss on the last answer alone: the earlier ones were written under an
   instruction that no longer stands before them.

The paper samples from the latest RLHF model and gives neither the number of dialogues nor of
turns. Ours: a dialogue yields several examples, each ending at another turn, in one row (each
begins as the next does, so loss and gradient are those of separate rows); ordinary dialogues can be
mixed in, so that ordinary chat is not forgotten; and where a judge is handed down, only answers
that obey become targets (rejection sampling by that judge).
"""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np

from puna.core import parallel
from puna.core.checkpoint.folder import open_model, tokenizer_path
from puna.core.documents import count_of
from puna.core.generation.memory import Memory
from puna.core.model import Transformer
from puna.core.text.chat import Message, decode_answer, encode_dialogue, encode_turn
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.capacity import fitting
from puna.trainers.data.columns import ReadingMessages
from puna.trainers.data.ghost import GhostDialogue, read_ghost_dialogues
from puna.trainers.data.packing import PackedRows
from puna.trainers.rl.config import EngineConfig, engine_of
from puna.trainers.rl.engine import Engine
from puna.trainers.rl.exchanges import Exchange, append_turn, load_turns, whole_turns
from puna.trainers.rl.judges import Judge, judged
from puna.trainers.rl.rewards import Answer
from puna.trainers.rl.rollout import at_hand, sample_everywhere
from puna.trainers.sft import load_dialogues
from puna.trainers.train import loop, next_token, written
from puna.trainers.train.command import command
from puna.trainers.train.interrupts import stop_requests
from puna.trainers.train.kinds import FREE
from puna.trainers.train.plan import of_epochs
from puna.trainers.train.progress import meter
from puna.trainers.train.ranges import Batch, Count, CountOrZero, Share, Temperature
from puna.trainers.train.run import Run, open_run
from puna.trainers.train.starting import open_start


@dataclass(kw_only=True)
class GAttConfig(EngineConfig, loop.RowsConfig, ReadingMessages):
    """Ghost Attention (paper section 3.3): teach a chat model to keep a system message."""

    model: Path
    """the latest chat model: it samples the answers and is trained on them"""
    dialogues: list[Path]
    """.jsonl of `turns` (what the user says) or of `messages`, with `instruction` and `short`"""
    instructions: list[Path] = field(default_factory=list)
    """.jsonl of `instruction` and `short`, drawn for dialogues that have none of their own"""
    mix: list[Path] = field(default_factory=list)
    """ordinary dialogues to train on besides"""
    truncate: bool = False
    """cut dialogues of `mix` that are longer than the model's context; off: they are skipped"""
    shorten: Share = 0.5
    """how often the instruction is replaced by its short form (paper: half of the time)"""
    samples: Batch = 1
    """answers drawn for each turn; the first that a judge accepts is taken"""
    targets: Count = 5
    """answers of one dialogue that are learned, each as if the dialogue ended there"""
    window: CountOrZero = 0
    """earlier exchanges that the sampling model sees; 0: all"""
    repeat: bool = True
    """the instruction stands in every user message while sampling (paper); off: in the first"""
    mask: bool = True
    """loss on a target alone, not on the answers before it (paper); off: on all answers"""
    temperature: Temperature = 1.0
    """of the sampled answers"""
    max_new_tokens: Count = 256
    """longest answer, tokens"""
    chunk: Annotated[Batch, FREE] = 512
    """answers drawn at a time, all processes together; asked to stop, the run ends after them, and
    what was drawn of a turn that is not whole is drawn again"""
    epochs: Count = 1
    lr: float = 2e-5
    """peak (the paper does not say; this is SFT's)"""

    def check(self) -> None:
        super().check()
        if self.window and not self.repeat:
            raise ValueError("without repeat the window leaves the instruction out: set it to 0")


def run(config: GAttConfig, judge: Judge | None = None) -> Path:
    """Sample and train, or continue, the run in `config.out`; returns the model's folder.

    `judge` decides which answers may become targets; without one every finished answer does.
    """
    tokenizer_file = tokenizer_path(config.model)
    with open_run(config, tokenizer=tokenizer_file, given={"judge": judge}) as folder:
        if folder.done:
            return folder.final
        return fit(config, folder, Tokenizer(tokenizer_file), judge)


def fit(config: GAttConfig, folder: Run, tokenizer: Tokenizer, judge: Judge | None) -> Path:
    """What there is still to do in an open run."""
    dialogues, skipped = read_ghost_dialogues(
        config.dialogues, config.instructions, config.seed, config
    )
    next_token.say(skipped)
    fitting.check("gatt", config, config.model)
    sampled = sampled_exchanges(config, folder, tokenizer, dialogues, judge)
    check_targets(folder, sampled)
    source = open_start(folder, config.model, head="lm")
    rows = training_rows(config, tokenizer, dialogues, sampled, source.config.context)
    plan = of_epochs(len(rows), config.epochs, config.batch, folder)
    what = rows.described("dialogue")
    return next_token.train("gatt", folder, source, rows, config, plan=plan, what=what)


def check_targets(folder: Run, sampled: Sequence[list[Exchange]]) -> None:
    """ValueError where no answer may be a target: they are removed, so that others can be drawn
    under other options."""
    if any(exchange.obeys for exchanges in sampled for exchange in exchanges):
        return
    parallel.barrier()  # every rank has read them
    if parallel.is_main():
        turns_of(folder).unlink(missing_ok=True)
        written.forget(turns_of(folder).parent, turns_of(folder).name)
    if not any(sampled):
        raise ValueError(
            "no dialogue can be sampled: with its instruction no first message leaves room for "
            "max_new_tokens in the model's context; lower it or give shorter dialogues"
        )
    raise ValueError(
        "no sampled answer may be a target: none ends within max_new_tokens and is accepted by the "
        "judge; raise max_new_tokens or samples, or start from a better chat model"
    )


def turns_of(folder: Run) -> Path:
    return folder.path / "samples" / "turns.jsonl"


def sampled_exchanges(
    config: GAttConfig,
    folder: Run,
    tokenizer: Tokenizer,
    dialogues: Sequence[GhostDialogue],
    judge: Judge | None,
) -> list[list[Exchange]]:
    """The answers to each dialogue, from samples/turns.jsonl as far as they are there."""
    path = turns_of(folder)
    if parallel.is_main():
        path.parent.mkdir(exist_ok=True)
    done = parallel.on_main(lambda: whole_turns(path))
    longest = max(len(d.turns) for d in dialogues)
    if done < longest:
        load_dialogues(config.mix, config)  # what cannot be read is said before anything is sampled
        model = loop.load(open_model(config.model, head="lm"), config, frozen=True)
        engine = engine_of(config, tokenizer)
        with at_hand(model, engine) as whole:
            _sample(config, whole, engine, tokenizer, dialogues, judge, path, done, longest)
    else:
        of_sampling = ("samples", "window", "repeat", "temperature", "max_new_tokens")
        folder.say_idle(of_sampling, f"the answers are drawn; {path} has them")
    parallel.barrier()
    return load_turns(path, dialogues, tokenizer.vocab_size)


def _sample(
    config: GAttConfig,
    model: Transformer,
    engine: Engine | None,
    tokenizer: Tokenizer,
    dialogues: Sequence[GhostDialogue],
    judge: Judge | None,
    path: Path,
    done: int,
    longest: int,
) -> None:
    """Turn by turn, all dialogues side by side; a turn is written when it is complete."""
    history = load_turns(path, dialogues, tokenizer.vocab_size)
    room = model.config.context - config.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a question in the model's "
            f"context of {model.config.context}; lower it"
        )
    memory = Memory()
    show = parallel.is_main()
    bar = meter("gatt: sampling", longest, start=done, unit="answers", show=show)
    with bar as progress, stop_requests(path) as stop:

        def look(whole: int) -> None:
            if stop():
                raise SystemExit(
                    f"stopped after {whole} of {count_of(longest, 'turn')}; the same "
                    "command continues "
                    f"{config.out}"
                )

        for turn in range(done, longest):
            going = [
                i
                for i, d in enumerate(dialogues)
                if turn < len(d.turns) and len(history[i]) == turn
            ]
            prompts = [_context(config, tokenizer, dialogues[i], history[i]) for i in going]
            fitting = [n for n, ids in enumerate(prompts) if len(ids) <= room]
            going, prompts = [going[n] for n in fitting], [prompts[n] for n in fitting]
            drawn = _candidates(
                config, model, engine, tokenizer, prompts, going, turn, memory, partial(look, turn)
            )
            exchanges = {
                i: _choose(tokenizer, dialogues[i], history[i], ids, candidates, judge)
                for i, ids, candidates in zip(going, prompts, drawn, strict=True)
            }
            if parallel.is_main():
                append_turn(path, exchanges, dialogues)
            for i, exchange in exchanges.items():
                history[i].append(exchange)
            progress.advance(len(going) * config.samples)
            look(turn + 1)


def _context(
    config: GAttConfig, tokenizer: Tokenizer, dialogue: GhostDialogue, history: list[Exchange]
) -> list[int]:
    """Step 1: the dialogue so far with the instruction in every user message, as ids."""
    seen = history[-config.window :] if config.window else history
    told = [dialogue.instruction, *[dialogue.instruction if config.repeat else ""] * len(seen)]
    ids: list[int] = []
    for exchange, instruction in zip(seen, told, strict=False):
        ids += encode_turn(tokenizer, exchange.user, instruction, later=bool(ids))
        ids += exchange.answer
    last = dialogue.turns[len(history)]
    return ids + encode_turn(tokenizer, last, told[-1], later=bool(ids))


def _candidates(
    config: GAttConfig,
    model: Transformer,
    engine: Engine | None,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    going: list[int],
    turn: int,
    memory: Memory,
    look: Callable[[], None],
) -> list[list[list[int]]]:
    """`samples` answers to each prompt; the draw depends on (seed, turn, dialogue, sample)."""
    count = config.samples
    answers = sample_everywhere(
        model,
        [ids for ids in prompts for _ in range(count)],
        max_new_tokens=config.max_new_tokens,
        eos_id=tokenizer.eos_ids,
        temperature=config.temperature,
        seed=config.seed,
        round_index=turn,
        prompt_ids=[i for i in going for _ in range(count)],
        sample_ids=list(range(count)) * len(going),
        memory=memory,
        engine=engine,
        chunk=config.chunk,
        look=look,
        **config.limits(),
        called=str(config.model),
    )
    return [answers[n * count : (n + 1) * count] for n in range(len(going))]


def _choose(
    tokenizer: Tokenizer,
    dialogue: GhostDialogue,
    history: Sequence[Exchange],
    prompt_ids: list[int],
    candidates: list[list[int]],
    judge: Judge | None,
) -> Exchange:
    """The first candidate that ends and obeys; where none does, the first, which is no target."""
    user = dialogue.turns[len(history)]
    messages = dialogue_so_far(tokenizer, dialogue, history)
    answers = [
        Answer(messages, decode_answer(tokenizer, ids), prompt_ids, ids)
        for ids in candidates
        if ids[-1] in tokenizer.eos_ids
    ]
    answers = [answer for answer in answers if answer.text]
    obeys = [True] * len(answers)
    if judge and answers:
        obeys = judged(judge, answers)
    for answer, obeyed in zip(answers, obeys, strict=True):
        if obeyed:
            return Exchange(user, answer.ids, True)
    first = candidates[0]
    if first[-1] not in tokenizer.eos_ids:
        first = [*first, tokenizer.eos_id]  # as context a cut answer must end somewhere
    return Exchange(user, first, False)


def dialogue_so_far(
    tokenizer: Tokenizer, dialogue: GhostDialogue, history: Sequence[Exchange]
) -> list[Message]:
    """The dialogue up to the turn that is being answered, for a judge to read."""
    messages: list[Message] = [{"role": "system", "content": dialogue.instruction}]
    for exchange in history:
        text = decode_answer(tokenizer, exchange.answer)
        messages.append({"role": "user", "content": exchange.user})
        messages.append({"role": "assistant", "content": text})
    return [*messages, {"role": "user", "content": dialogue.turns[len(history)]}]


def training_rows(
    config: GAttConfig,
    tokenizer: Tokenizer,
    dialogues: Sequence[GhostDialogue],
    sampled: Sequence[list[Exchange]],
    context: int,
) -> PackedRows:
    """Steps 2 and 3, and the ordinary dialogues mixed in."""
    mixed, skipped = load_dialogues(config.mix, config)
    sequences = []
    where: list[str] = []
    for index, (dialogue, exchanges) in enumerate(zip(dialogues, sampled, strict=True)):
        place = dialogue.where or f"dialogue {index + 1}"
        if len(exchanges) < len(dialogue.turns):
            skipped.add("later turns of a dialogue that fills the context", place)
        rng = np.random.default_rng((config.seed, index))
        usable = [turn for turn, exchange in enumerate(exchanges) if exchange.obeys]
        chosen = set(rng.permutation(usable)[: config.targets].tolist())
        told = dialogue.short if rng.random() < config.shorten else dialogue.instruction
        while chosen:
            found = example(tokenizer, told, exchanges[: max(chosen) + 1], chosen, config.mask)
            if len(found[0]) <= context:
                sequences.append(found)
                where.append(dialogue.where)
                break
            chosen.remove(max(chosen))
            skipped.add("answers beyond the context", place)
    sequences += [encode_dialogue(tokenizer, dialogue.messages) for dialogue in mixed]
    where += [dialogue.where for dialogue in mixed]
    rows = PackedRows(
        sequences,
        context,
        vocab_size=tokenizer.vocab_size,
        where=where,
        truncate=config.truncate,
    )
    skipped.merge(rows.skipped)
    next_token.say(skipped)
    return rows


def example(
    tokenizer: Tokenizer,
    told: str,
    exchanges: Sequence[Exchange],
    targets: Collection[int],
    mask: bool = True,
) -> tuple[list[int], list[float]]:
    """(ids, weights): the instruction in the first user message, loss on the answers of the turns
    `targets` only, or without the `mask` on every answer."""
    ids: list[int] = []
    weights: list[float] = []
    for turn, exchange in enumerate(exchanges):
        asked = encode_turn(tokenizer, exchange.user, told if turn == 0 else "", later=turn > 0)
        ids += asked + exchange.answer
        learned = float(not mask or turn in targets)
        weights += [0.0] * len(asked) + [learned] * len(exchange.answer)
    return ids, weights


def main() -> int:
    return command("python -m puna.trainers.gatt", GAttConfig, run)


if __name__ == "__main__":
    sys.exit(main())
