"""The page of the experiments: for each question the short answer, the experiment, the figures, and
what the paper says beside it.

`python -m puna.demo.reproduce.page runs/reproduce docs [runs/another ...]` writes docs/questions.md
and docs/figures/ from what a run measured, and beside its comparisons those of other runs. The
words are ours; every number of this run comes from the run, and what it did not measure says so.
What fails stands in the same table as what succeeds.
"""

import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from matplotlib.figure import Figure

from puna.core.checkpoint.atomic import write_text
from puna.core.documents import count_of, field, read_object
from puna.core.terminal import say
from puna.demo.report.drawing import save_svg
from puna.demo.report.figures import margins
from puna.demo.reproduce import plots
from puna.demo.reproduce.arms import BY_NAME, SFT, title_of
from puna.demo.reproduce.claims import Claim, verdict
from puna.demo.reproduce.results import compared, read_results, shown, with_interval
from puna.demo.reproduce.tables import Estimate, Results, figure
from puna.trainers.rl.losses import MARGINS

HEAD = Template("""\
# Four questions about Llama 2

Written by `puna reproduce` (seed $seed, scale $scale): every number that is not the paper's was
measured by it, on held-out prompts of the demo's made-up world and by its oracle, with a model of a
million parameters. So it shows how the parts work and says nothing about 70B. What the paper says
and what we read into it are kept apart. `python -m puna.demo.reproduce.page runs/reproduce
docs$more` writes this page again.

All arms start from one SFT model. A seed varies what an arm samples and trains, and has comparisons
and reward models of its own. An interval is of 95% and holds for other seeds, so for other judges
too, and other prompts; where there is one seed, for other prompts alone. It does not hold for
another SFT model. $others A difference is taken prompt by prompt, in
percentage points (rewards and attention as they are). *Agrees* and *disagrees* are said where the
interval lies on one side of 0; there are $claims comparisons, so one or two of them would do so by
chance. Amounts of data are named as they are at scale 1. $seeds $left
""")


class Ran(NamedTuple):
    """A run of `puna reproduce` and all that it measured."""

    results: Results
    left: list[str]  # what it did not measure
    seed: int
    scale: float
    threads: int  # sums in another order make another SFT model


class Section(NamedTuple):
    """A question: what is no number."""

    title: str
    answer: str
    paper: str
    reading: str
    experiment: str
    pictures: tuple[tuple[str, str, Callable[[Results], Figure | None]], ...]
    table: tuple[str, ...]  # figures of all arms of the question


SECTIONS = (
    Section(
        "1. What does it mean for an RLHF model to forget context?",
        "Nothing leaves the input: what no training made answers depend on stops deciding them, "
        "be it an instruction some turns back or a skill that no judge looks at.",
        "The paper uses it for two things. Within a dialogue an instruction that should hold "
        "throughout binds the first answers and is then ignored, although it is still inside the "
        "context window (section 3.3, Table 30; Fig. 10). Across versions, V3, trained on samples "
        "of V2 alone, got worse at some things, rhyming for one, which the best samples of all "
        "earlier versions cured (section 3.2.3).",
        "Nothing is lost from the input. The model has rarely been trained on answers that depend "
        "on a message many turns back, so the recent turns decide. Ghost Attention makes such "
        "training data. A skill that no judge rewards survives only as far as what is imitated "
        "still has it: each version copies the mistakes of the one before it.",
        "Ghost Attention on the model after rejection sampling (200 dialogues of 20 exchanges, "
        "three times), and with one thing changed: loss on all answers instead of the last one; "
        "the instruction in the first message alone while sampling, with the whole dialogue in "
        "view; every finished answer as a target instead of those that keep the instruction by "
        "the oracle. Greedy answers to 100 dialogues under held-out values, 60 under trained "
        "ones, and 60 under a kind of instruction that it never trains on (a drink). For "
        "versions: three of them on the same prompts, a third of which ask for three words to "
        "be said again, judged by lot there and by the reward models elsewhere; each is trained "
        "from the SFT model on the best of its own samples, or of those of all versions. The "
        "fading is built into the demo's demonstrations, its repair is not.",
        (
            ("experiment-kept", "Instruction kept by answer", plots.instructions),
            ("experiment-attention", "Attention to the instruction by answer", plots.attention),
            ("experiment-repeat", "A skill that no judge sees", plots.repeated),
        ),
        (
            "kept value 6", "kept value 20", "kept seen 20", "kept kind 20", "attention 20",
            "helpful greedy", "repeat t1",
        ),
    ),
    Section(
        "2. How are the two reward models combined: two scalars or something richer?",
        "Two scalars and a switch between them, nothing learned. What other ways to a reward do "
        "here:",
        "Two scalars and a hard switch (section 3.2.3, Eq. 4): the safety score is the reward if "
        "the prompt is tagged as risky or the safety model gives the answer less than 0.15, the "
        "helpfulness score otherwise. At 0.15 the safety model finds unsafe answers with precision "
        "0.89 and recall 0.55. Two models, because one may find it hard to be good at two aims "
        "that conflict (section 3.2.2).",
        "The second clause guards prompts that nobody tagged. The seam is discontinuous, and one "
        "whitening mixes the scores of two models which nothing puts on one scale.",
        "Rejection sampling from the SFT model, 8 answers to each of 960 prompts, with one of five "
        "rewards: the switch; the plain sum of both scores; one model trained on both kinds of "
        "comparisons; each of the two models alone. The safety model has a tenth of helpfulness "
        "comparisons mixed in, as the paper's, and one more is without. Below, the policies at "
        "temperature 1, and the reward models on held-out comparisons (a pair counts once, however "
        "many of its answers are unsafe).",
        (("experiment-judges", "Policies by their reward", plots.judged),),
        (
            "violations t1", "helpful t1", "false refusals t1", "borderline refusals t1",
            "precision 0.15", "recall 0.15", "right both safe", "branch is_safety", "branch unsafe",
        ),
    ),
    Section(
        "3. How did PPO go, and why did it help?",
        "On top of rejection sampling, and the paper does not say which part of it helped. What it "
        "adds here, and what its parts do:",
        "Rejection sampling alone up to about V4, then PPO on top of it; V5 with PPO is clearly "
        "above V5 without it, by its own reward models and by GPT-4 (section 3.4, Fig. 11). There "
        "is no ablation of the cause; the text contrasts breadth (the best of K answers of one "
        "frozen policy) with depth (answers of the policy as it has just been updated).",
        "Rejection sampling imitates winners, so it ends where the frozen policy's best samples "
        "end. PPO samples again from each improved policy and also learns from bad answers. A part "
        "of any gain is measured by the very models that are optimised, so another judge is "
        "needed; and a distribution that is only sharper wins at temperature 1 and not greedily.",
        "Equally many samples to the same prompts: all by rejection sampling, all by PPO (60 "
        "iterations of 128, the first 10 for the critic alone), half and half; and PPO on top of "
        "all of rejection sampling, which has twice as many: by the reward models of the first "
        "version, which saw answers of the SFT model only, at temperature 1 and at 1.3; by those "
        "of a second version, made as in the loop from comparisons of what PPO starts with, too, "
        "at both; and by the oracle, which is never wrong. Rejection sampling that takes any one "
        "of the K answers shows what fine-tuning on own answers does without a judge. PPO without "
        "whitening, without KL and its limit, and on the sum of both scores. A second version of "
        "rejection sampling with the temperature as it was, and chosen again. The oracle judges, "
        "and beside it the first version's reward models: where these rise and wins do not, it is "
        "over-optimisation.",
        (("experiment-ppo", "Wins and reward", plots.improved),),
        ("wins t1", "wins greedy", "reward t1", "reward greedy", "helpful t1", "violations t1"),
    ),
    Section(
        "4. How does the ranking loss work, and why does m(r) help?",
        "It orders two answers by the difference of their scores, and m(r) asks for one as large "
        "as people's preference was. What that gains here:",
        "The loss is -log sigma(r_chosen - r_rejected - m(r)) (section 3.2.2, Eq. 2), with a "
        "margin m that is larger the clearer the annotator's choice was (Table 27). Margins raised "
        "the accuracy on clear pairs from 79.1 to 80.7 and cost a little on near ties (Table 28). "
        "Large margins push scores to the two ends, which PPO may not like (Fig. 27). An auxiliary "
        "loss of the safety model raised the share of unsafe answers that it finds from 73.0 to "
        "90.4 (Table 29).",
        "It is logistic regression on the difference of two scores. Without a margin a clear pair "
        "and a near tie are pushed alike; with one, a clear pair is pushed until it is apart by "
        "about m. The degree that annotators gave anyway becomes a rough unit of the score.",
        "The same comparisons with no, the small and the large margin, two seeds more than other "
        "arms have, on held-out comparisons, each of another prompt. The safety model with and "
        "without the auxiliary loss. PPO on a helpfulness model with the large margin.",
        (
            ("experiment-margins", "Reward models by margin", plots.ranked),
            ("experiment-loss", "The loss's push by margin", lambda _: margins(MARGINS)),
        ),
        (
            "right significantly_better", "right negligibly_better", "right all", "at the ends",
            "recall 0.5", "recall 0.15", "precision 0.15", "wins t1",
        ),
    ),
)  # fmt: skip

NO_CELL = "–"  # not a figure of this arm, or nothing was there to count
COLUMNS = {
    "kept value 6": "keep it at 6",
    "kept value 20": "keep it at 20",
    "kept seen 20": "at 20, trained values",
    "kept kind 20": "at 20, another kind",
    "attention 20": "attention at 20",
    "helpful greedy": "helpful, greedy",
    "helpful t1": "helpful",
    "repeat t1": "said again rightly",
    "violations t1": "violations",
    "false refusals t1": "false refusals",
    "borderline refusals t1": "refuse what sounds unsafe",
    "precision 0.15": "precision at .15",
    "recall 0.15": "recall at .15",
    "recall 0.5": "recall at .5",
    "branch is_safety": "scored by safety, tagged",
    "branch unsafe": "scored by safety, below .15",
    "wins t1": "wins over SFT, T=1",
    "wins greedy": "wins, greedy",
    "reward t1": "reward, T=1",
    "reward greedy": "reward, greedy",
    "right significantly_better": "clear pairs",
    "right negligibly_better": "near ties",
    "right all": "all pairs",
    "right both safe": "pairs of safe answers",
    "at the ends": "at the ends",
}


def write_page(path: Path, run: Ran, others: Sequence[Ran] = ()) -> Path:
    """Write the page of a run to `path` and its figures to figures/*.svg beside it; returns `path`.
    The comparisons of `others`, which have SFT models of their own, stand beside the run's."""
    claims = compared(run.results)
    beside = [[found for _, found in compared(other.results)] for other in others]
    head = HEAD.substitute(
        seed=run.seed,
        scale=f"{run.scale:g}",
        claims=len(claims),
        seeds=seeds_said(run.results),
        others=others_said(run, others),
        more=" runs/another" * len(others),
        left=f"Left out, because the time was over: {'; '.join(run.left)}." if run.left else "",
    )
    rows = [Row(claim, found, each) for (claim, found), *each in zip(claims, *beside, strict=True)]
    parts = [*head.split("\n\n")]
    for number, section in enumerate(SECTIONS, 1):
        own = [row for row in rows if row.claim.question == number]
        parts += section_of(path.parent, run.results, section, number, own)
    write_text(path, "\n\n".join(map(wrapped, parts)).rstrip() + "\n")
    return path


def others_said(run: Ran, others: Sequence[Ran]) -> str:
    """What the columns of other runs are; nothing where there is none."""
    if not others:
        return ""
    told = [f"seed {each.seed} on {count_of(each.threads, 'thread')}" for each in others]
    return (
        f"This run was made on {count_of(run.threads, 'thread')}; beside its comparisons stand "
        f"those of another ({'; '.join(told)}). Sums in another order are enough for another SFT "
        "model: where runs do not agree, a figure depends on it more than on all that an interval "
        "knows of."
    )


def write_again(folder: Path, docs: Path, others: Sequence[Path] = ()) -> Path:
    """The page of the run in `folder` as `docs`/questions.md; ValueError where one has none."""
    return write_page(docs / "questions.md", ran(folder), [ran(other) for other in others])


def ran(folder: Path) -> Ran:
    """A finished run. ValueError where it is none."""
    found = read_object(folder / "results.json", "no such file; let puna reproduce finish first")
    machine = read_object(folder / "environment.json", "no such file; is it a run's folder?")
    return Ran(
        read_results(folder, field(found, "seeds", int)),
        [str(name) for name in field(found, "left_out", list)],
        field(found, "seed", int),
        field(found, "scale", float),
        field(machine, "threads", int),
    )


class Row(NamedTuple):
    """A comparison, here and in other runs."""

    claim: Claim
    found: Estimate | None
    others: list[Estimate | None]


def section_of(
    folder: Path,
    results: Results,
    section: Section,
    number: int,
    rows: list[Row],
) -> list[str]:
    """The paragraphs of one question."""
    return [
        f"## {section.title}",
        f"**Short answer.** {section.answer}",
        short_answer(results, rows),
        f"**The paper.** {section.paper}",
        f"**Our reading.** {section.reading}",
        f"**The experiment.** {section.experiment}",
        arms_table(results, number, section.table),
        *(image(folder, results, *picture) for picture in section.pictures),
        "**The paper beside it.**",
        claims_table(rows),
    ]


def short_answer(results: Results, rows: list[Row]) -> str:
    """The comparisons that matter most, a line each."""
    return "\n".join(f"- {sentence(results, row)}" for row in rows if row.claim.leads)


def sentence(results: Results, row: Row) -> str:
    claim, found, others = row
    ours, theirs = (figure(results, arm, claim.figure) for arm in (claim.arm, claim.other))
    what = f"{claim.what[0].upper()}{claim.what[1:]}"
    if found is None or ours is None or theirs is None:
        return f"{what}: not measured."
    values = [shown(claim.figure, each.mean) for each in (ours, theirs)]
    names = [title_of(arm) for arm in (claim.arm, claim.other)]
    by = with_interval(claim.figure, found, signed=True)
    sides = " and ".join(f"{value} ({name})" for value, name in zip(values, names, strict=True))
    here = f"{what}: {sides}, {by}: {verdict(claim, found)}"
    there = [f"with another SFT model {judged(claim, other)}" for other in others]
    return f"{'; '.join([here, *there])}."


def judged(claim: Claim, found: Estimate | None) -> str:
    """A difference and what it says of the claim; "not measured" for none."""
    by = with_interval(claim.figure, found, signed=True)
    return by if found is None else f"{by}: {verdict(claim, found)}"


def arms_table(results: Results, number: int, names: Sequence[str]) -> str:
    """Every arm of a question with its figures; one that was not measured says so."""
    arms = [SFT] if number < 4 else []
    arms += [arm.name for arm in BY_NAME.values() if number in arm.questions]
    rows = []
    for arm in arms:
        found = [figure(results, arm, name) for name in names]
        seeds = "1" if arm == SFT else str(len(results.get(arm, {})))
        if arm not in results:
            rows.append([title_of(arm), "0", "not measured", *[NO_CELL] * (len(names) - 1)])
            continue
        cells = [with_interval(n, f) if f else NO_CELL for n, f in zip(names, found, strict=True)]
        rows.append([title_of(arm), seeds, *cells])
    return markdown(["arm", "seeds", *(COLUMNS[name] for name in names)], rows)


def claims_table(rows: list[Row]) -> str:
    """Where we agree with the paper and where not."""
    header = ["figure", "arm / against", "difference", "the paper", "together"]
    header += ["another SFT model"] * len(rows[0].others)
    cells = [
        [
            claim.what,
            f"{title_of(claim.arm)} / {title_of(claim.other)}",
            with_interval(claim.figure, found, signed=True),
            claim.paper,
            verdict(claim, found),
            *(judged(claim, other) for other in others),
        ]
        for claim, found, others in rows
    ]
    return markdown(header, cells)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def image(
    folder: Path,
    results: Results,
    name: str,
    text: str,
    draw: Callable[[Results], Figure | None],
) -> str:
    if (drawing := draw(results)) is None:
        return f"*{text}: not measured.*"
    path = save_svg(drawing, folder / "figures" / f"{name}.svg")
    return f"![{text}]({path.relative_to(folder).as_posix()})"


def seeds_said(results: Results) -> str:
    """How many seeds the arms have."""
    counts = [len(results.get(arm, {})) for arm in BY_NAME]
    few, many = min(counts), max(counts)
    told = f"{few} to {many} seeds" if few < many else count_of(few, "seed")
    return f"The arms have {told}."


def wrapped(paragraph: str) -> str:
    if paragraph.startswith(("#", "!", "|")):
        return paragraph
    if paragraph.startswith("- "):
        return "\n".join(filled(line, "  ") for line in paragraph.split("\n"))
    return filled(paragraph)


def filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    run, docs, *others = map(Path, sys.argv[1:])
    say(write_again(run, docs, others))
