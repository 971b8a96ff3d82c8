"""How good chat models are, on prompts that none of them has seen (paper sections 3.4, 4.4, 5.1).

Every model answers, then the answers are judged: by reward models, by people who write their
judgements into a file, or by functions from Python. All that is drawn stays in the folder, so an
interrupted evaluation goes on, and one that waits for people does, too.

    wins                  against another model, on the same prompts; scores by the judges
    violations            unsafe answers to prompts tagged `safety`
    refusals              of ordinary and of borderline prompts
    instruction_kept      answer by answer, the instruction in the first message alone
    curves                Self-BLEU and reward by temperature, the best of K
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor

from puna.core import parallel, ranks
from puna.core.checkpoint.atomic import write_text
from puna.trainers.data.formats import Prompt
from puna.trainers.data.ghost import GhostDialogue, read_ghost_dialogues
from puna.trainers.evaluation import curves, dialogues, report, safety, wins
from puna.trainers.evaluation.answers import (
    Reader,
    Scorer,
    common_prompts,
    draw,
    drawing_of,
    drawn,
    kept_in,
    reader_of,
)
from puna.trainers.evaluation.config import EvaluateChatConfig, check_chat, policies
from puna.trainers.rl.best_of import Drawn
from puna.trainers.rl.comparisons import Annotator
from puna.trainers.rl.config import frozen
from puna.trainers.rl.judges import Judge
from puna.trainers.rl.rounds import Waiting
from puna.trainers.train import next_token
from puna.trainers.train.claim import owned
from puna.trainers.train.command import command

PAIRS, DIALOGUES = "pairs.jsonl", "dialogues.jsonl"  # what waits for people
Found = dict[str, Any]


def run(
    config: EvaluateChatConfig,
    annotator: Annotator | None = None,
    refuses: Judge | None = None,
    keeps: Judge | None = None,
) -> Found:
    """Draw what is missing, judge, print tables; write evaluation.json and plots into `config.out`
    and return what the first says.

    `annotator` judges pairs, `refuses` says which answers are refusals, `keeps` which keep their
    instruction. Raises ValueError where something is missing that a measure needs; Waiting, once
    all else is written, where people have yet to judge.
    """
    ranks.init()
    check_chat(config, annotator, refuses, keeps)
    given = {"annotator": annotator, "refuses": refuses, "keeps": keeps}
    waiting: list[str] = []
    # What people say comes later than the answers, and decides nothing of them.
    with owned(replace(config, judgements=None, kept=None), given=given):
        talks = draw_all(config)
        readers = [reader_of(path) for path in policies(config)]
        found: Found = {"models": [str(path) for path in config.model]}
        if config.prompts and (config.judge or config.against):
            found |= preferred(config, readers, annotator, waiting)
        if config.safety:
            found["violations"] = violations(config, readers)
        if config.ordinary or config.borderline:
            found |= refusals(config, readers, refuses)
        if talks:
            found |= instructions(config, readers, talks, keeps, waiting)
        if config.curves:
            judge = Scorer(config.judge, config) if config.judge else None
            found["curves"] = curves.measure(config, readers[: len(config.model)], judge)
        if parallel.is_main():
            write_text(config.out / "evaluation.json", json.dumps(found, indent=2) + "\n")
            report.show(found)
            report.plot(config.out, found)
        parallel.barrier()  # no rank ends, waiting, before all is written
    if waiting:
        raise Waiting("; ".join(waiting))
    return found


def draw_all(config: EvaluateChatConfig) -> list[GhostDialogue]:
    """The answers that are missing, of one model after the other; returns the dialogues."""
    sets: dict[str, list[Prompt]] = {
        name: common_prompts(paths, config)
        for name in ("prompts", "ordinary", "borderline")
        if (paths := getattr(config, name))
    }
    if config.safety and not any(prompt.is_safety for prompt in sets["prompts"]):
        raise ValueError(
            "no prompt is tagged `safety`, so none can be answered with a violation; tag some or "
            "leave safety out"
        )
    talks: list[GhostDialogue] = []
    if config.dialogues:
        talks, skipped = read_ghost_dialogues(
            config.dialogues, config.instructions, config.seed, config
        )
        next_token.say(skipped)
    further = curves.work_of(config)
    for number, path in enumerate(policies(config)):
        policy = frozen(path, "lm", config)
        is_baseline = path == config.against  # answers what it is compared on, and no more
        work = [
            (name, prompts, drawing_of(config, f"{name}, model {number + 1}"))
            for name, prompts in sets.items()
            if name == "prompts" or not is_baseline
        ]
        draw(config, number, policy, work if is_baseline else [*work, *further])
        if talks and not is_baseline:
            dialogues.talk(config, number, policy, talks)
    return talks


def preferred(
    config: EvaluateChatConfig,
    readers: Sequence[Reader],
    annotator: Annotator | None,
    waiting: list[str],
) -> Found:
    """`scores` of each model by each judge, and `wins` over the other model."""
    answers = [drawn(config, number, "prompts") for number in range(len(readers))]
    scores = {
        name: scored(Scorer(path, config), answers, readers)
        for name, path in (("judge", config.judge), ("second_judge", config.second_judge))
        if path is not None
    }
    found: Found = {"against": str(config.against)} if config.against else {}
    if scores:
        found["scores"] = {
            str(reader.path): {name: float(each[number].mean()) for name, each in scores.items()}
            for number, reader in enumerate(readers)
        }
    if config.against is None:
        return found
    matches = [
        wins.match(ours, answers[-1], config.seed, number)
        for number, ours in enumerate(answers[:-1])
    ]
    said = {
        name: [wins.by_scores(m, each[n], each[-1]) for n, m in enumerate(matches)]
        for name, each in scores.items()
    }
    if annotator is not None:
        said["annotator"] = [
            wins.by_annotator(each, annotator, readers[n], readers[-1])
            for n, each in enumerate(matches)
        ]
    if config.judgements is not None:
        if parallel.broadcast(config.judgements.exists()):
            said["judgements"] = wins.by_judgements(config.judgements, matches)
        else:
            parallel.on_main(lambda: wins.write_pairs(config.out / PAIRS, matches))
            waiting.append(
                f"{config.out / PAIRS} waits to be judged: write pair and winner (a, b or tie) of "
                f"each row to {config.judgements}, then run the same command"
            )
    found["wins"] = {
        str(model): wins_of(matches[n], {name: each[n] for name, each in said.items()})
        for n, model in enumerate(config.model)
    }
    return found


def scored(
    judge: Scorer, answers: Sequence[Sequence[Drawn]], readers: Sequence[Reader]
) -> list[Tensor]:
    """One judge's raw scores (S,) of each model's answers."""
    return [judge(rows, reader) for rows, reader in zip(answers, readers, strict=True)]


def wins_of(found: wins.Match, said: Mapping[str, Tensor]) -> Found:
    """One model's results by judge, and how often each two of the judges agree."""
    return {
        "by": {name: wins.result(found, differences) for name, differences in said.items()},
        "agreement": {
            f"{one} and {other}": share
            for one, other in combinations(said, 2)
            if (share := wins.agreement(found, said[one], said[other])) is not None
        },
    }


def violations(config: EvaluateChatConfig, readers: Sequence[Reader]) -> Found:
    """By model, the share of answers to prompts tagged `safety` that are unsafe."""
    assert config.safety is not None, "checked to be there"
    judge = Scorer(config.safety, config)
    found: Found = {"threshold": config.safety_threshold, "by": {}}
    for number, reader in enumerate(readers):
        rows = [row for row in drawn(config, number, "prompts") if row["is_safety"]]
        unsafe = safety.are_unsafe(judge(rows, reader), config.safety_threshold)
        found["by"][str(reader.path)] = safety.share(unsafe, rows)
    return found


def refusals(config: EvaluateChatConfig, readers: Sequence[Reader], refuses: Judge | None) -> Found:
    """By model, the shares of ordinary and borderline prompts that it refuses."""
    found: Found = {"refusals": {"by": {}}}
    classifier = Scorer(config.refusals, config) if config.refusals else None
    if classifier is not None:
        known = safety.refusal_threshold(classifier, config.refusal_pairs, config)
        found["refusals"]["classifier"] = known
    for number, reader in enumerate(readers[: len(config.model)]):
        shares = found["refusals"]["by"][str(reader.path)] = {}
        for name in ("ordinary", "borderline"):
            if getattr(config, name):
                rows = drawn(config, number, name)
                if classifier is not None:
                    yes = classifier(rows, reader) > known["threshold"]
                else:
                    assert refuses is not None, "checked to be there"
                    yes = safety.by_function(refuses, rows, reader)
                shares[name] = safety.share(yes, rows)
    return found


def instructions(
    config: EvaluateChatConfig,
    readers: Sequence[Reader],
    talks: Sequence[GhostDialogue],
    keeps: Judge | None,
    waiting: list[str],
) -> Found:
    """By model, the share of answers that keep the instruction, by number of the answer."""
    answers, turns = [], []
    for number in range(len(config.model)):
        said = dialogues.read_said(kept_in(config, number, "dialogues"), talks)
        each = dialogues.answers_to_judge(talks, said, readers[number].tokenizer)
        answers.append(each[0])
        turns.append(each[1])
    if keeps is not None:
        kept = [dialogues.by_judge(each, keeps) for each in answers]
    elif config.kept is not None and parallel.broadcast(config.kept.exists()):
        kept = dialogues.by_judgements(config.kept, answers)
    else:
        parallel.on_main(lambda: dialogues.write_answers(config.out / DIALOGUES, answers))
        waiting.append(
            f"{config.out / DIALOGUES} waits to be judged: write answer and kept (true or false) "
            f"of each row to {config.kept}, then run the same command"
        )
        return {}
    return {
        "instruction_kept": {
            str(model): dialogues.by_turn(talks, turns[n], kept[n])
            for n, model in enumerate(config.model)
        }
    }


def main() -> int:
    return command("python -m puna.trainers.evaluation.chat", EvaluateChatConfig, run)


if __name__ == "__main__":
    sys.exit(main())
