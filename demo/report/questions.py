"""docs/questions.md: four questions about the paper, answered with a demo run's own figures.

`python -m puna.demo.report.questions runs/demo docs` writes the page and docs/figures/ anew.
The words are ours; every number of this run comes from the run.
"""

import sys
import textwrap
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from puna.core.checkpoint.atomic import write_text
from puna.core.terminal import say
from puna.demo.report import figures, reward_figures
from puna.demo.report.drawing import save_svg
from puna.demo.report.results import (
    RATINGS,
    TURNS,
    Evaluation,
    Rows,
    accuracies,
    first_and_last,
    gatt_base,
    kept,
    last_version,
    load_evaluation,
    measured,
    metrics,
    percent,
    rate,
    rlhf_versions,
    series,
    settings,
    title,
    version_names,
)
from puna.trainers.rl.losses import MARGINS

PAGE = Template("""\
# Four questions about Llama 2

First edition, written by a run of `puna demo` (seed $seed, $parameters): every number marked
*This run* was measured by it, on held-out prompts and by the oracle of its made-up world. It is
one seed of a very small model, so it shows how the parts work and says nothing about 70B. What the
paper says and what we read into it are kept apart. `python -m puna.demo.report.questions runs/demo
docs` writes this page again.

## 1. What does it mean for an RLHF model to forget context?

**The paper** uses it for two things. Within a dialogue: an instruction that should hold throughout
("always act as ...") binds the first answers and is then ignored, although it is still inside the
context window; people found it kept in 100% of second answers, 10% of fourth and none of sixth
ones (section 3.3, Table 30). Attention to the system message fades with the turns (Fig. 10).
Across versions: V3, trained on samples of V2 alone, got worse at some things, rhyming for one,
which the best samples of all earlier versions cured (section 3.2.3).

**Our reading.** Nothing is lost from the input. The model has rarely been trained on answers that
depend on a message many turns back, so the recent turns decide. Ghost Attention makes such
training data: answers are sampled with the instruction repeated in every turn, then learned with
the instruction in the first turn only and no loss on the earlier turns, whose answers would
contradict what the model is shown.

**This run** measures instructions whose values no training data has. Greedy, the instruction is
kept in $turns of answers $turn_names without Ghost Attention, and in $turns_gatt with it; in
$turns_last at the end of the loop, after further fine-tuning from that model and PPO. Of a kind
of instruction that Ghost Attention never trains on (a drink) it is $turns_kind without and
$turns_kind_gatt with it. Only answers that pass the oracle's `keeps` became training targets, and
the same oracle measures. At temperature 1 the twentieth answer keeps it in
$last_t1 without and $last_gatt_t1 with it. Helpful answers to ordinary requests: $helpful_before
before, $helpful_after after. The demo's demonstrations have personas only in short dialogues, so
that there is something to forget: fading is built in, its repair is not.

$figure_kept

$figure_kept_among

$figure_attention

## 2. How are the two reward models combined: two scalars or something richer?

**The paper:** two scalars and a hard switch (section 3.2.3, Eq. 4). Both models score an answer. If
the prompt is tagged as risky, or the safety model gives the answer less than 0.15, the safety score
is the reward; otherwise the helpfulness score is. The score is turned back into its logit,
whitened, and then beta times the KL to the starting policy is subtracted. At 0.15 the safety model
finds unsafe answers with precision 0.89 and recall 0.55.

**Our reading.** The second clause guards prompts that nobody tagged: an answer that looks unsafe
cannot buy its way out with helpfulness. The threshold prefers precision, so that few good answers
are punished. The seam is discontinuous, and one whitening mixes the scores of two models, which
nothing puts on one scale; so it is worth logging how often each branch is taken.

**This run.** Of the answers scored for $version_scored, $tagged came from tagged prompts, $unsafe
were caught by the threshold and $untouched were judged by the helpfulness model. From SFT to
$last_name the rate of harmful help went from $violation_sft to $violation_last, false refusals of
ordinary requests from $refusal_sft to $refusal_last, and refusals of requests that only sound
unsafe from $borderline_sft to $borderline_last.

$figure_switch

## 3. How did PPO go, and why did it help?

**The paper** used rejection sampling alone up to about V4, then PPO on top of it (batch 512,
learning rate 1e-6, clip 0.2, beta 0.01 or 0.005, 200 to 400 iterations; section 3.2.3). V5 with
PPO is clearly above V5 without it, by its own reward models and by GPT-4 (section 3.4, Fig. 11).
There is no ablation of the cause; the text contrasts breadth (the best of K answers of one
frozen policy) with depth (answers of the policy as it has just been updated).

**Our reading.** Rejection sampling imitates winners, so it ends where the frozen policy's best
samples end. PPO samples again from each improved policy, so gains compound, and it also learns from
bad answers by making them less likely. The KL term, whitening, small steps and early stopping keep
it from exploiting the reward models; a part of the gain is measured by the very models that are
optimised, so another judge is needed.

**This run.** $ppo_run Wins over SFT by the oracle at temperature 1: $wins; greedy: $wins_greedy.
$ppo_gain What greedy decoding does not gain is a sharper distribution rather than better best
answers.

$figure_ppo

$figure_wins

## 4. How does the ranking loss work, and why does m(r) help?

**The paper:** the loss is -log sigma(r_chosen - r_rejected - m(r)) (section 3.2.2, Eq. 2), with a
margin m that is larger the clearer the annotator's choice was (Table 27: 1, 2/3, 1/3, 0 or 3, 2, 1,
0). Margins raised the accuracy on clear pairs from 79.1 to 80.7 and cost a little on near ties
(54.5 to 54.3 with the large one; Table 28). Large margins push scores to the two ends, which PPO
may not like (Fig. 27).

**Our reading.** It is logistic regression on the difference of two scores: only differences count.
The push on a pair is sigma(m - difference). Without a margin a clear pair and a near tie are pushed
alike, and both pushes fade once the pair is in order; with one, a clear pair is pushed until it is
apart by about m. The degree that annotators gave anyway becomes a rough unit of the score.

**This run** was trained with $margin. From the least clear rating to the clearest, the
helpfulness model orders $accuracy_helpfulness of held-out pairs as the annotator did, the safety
model $accuracy_safety. It used one margin table only, so it shows how accuracy follows
the rating and not what the margin adds: that takes the same data with and without it.

$figure_accuracy

$figure_margins
""")


def write_questions(folder: Path, docs: Path) -> Path:
    """Write `docs`/questions.md and `docs`/figures/*.svg from the run in `folder`; returns the
    page's path."""
    evaluation = load_evaluation(folder)
    ppo = metrics(folder, evaluation, "ppo")
    drawn = {
        "kept": ("Instruction kept by answer number", figures.instruction_kept(evaluation)),
        "kept_among": (
            "Instruction kept by what is new about it",
            figures.instruction_kept_among(evaluation),
        ),
        "attention": (
            "Attention to the instruction by answer number",
            figures.instruction_attention(evaluation),
        ),
        "switch": ("Branches of the reward switch", reward_figures.switch_branches(evaluation)),
        "ppo": ("PPO over its iterations", figures.ppo(ppo)),
        "wins": ("Win rate over SFT", figures.win_rates(evaluation)),
        "accuracy": ("Accuracy by rating", reward_figures.reward_accuracy(evaluation)),
        "margins": ("The loss's push by margin", figures.margins(MARGINS)),
    }
    values = {f"figure_{name}": _image(docs, name, *entry) for name, entry in drawn.items()}
    count = evaluation.get("parameters")
    text = PAGE.substitute(
        values,
        seed=evaluation.get("seed", "unknown"),
        parameters=f"{count / 1e6:.1f} million parameters" if count else "size not noted",
        ppo_run=_ppo_run(settings(folder, evaluation, "ppo"), ppo),
        margin=_margin(settings(folder, evaluation, "helpfulness")),
        **_kept(evaluation),
        **_switch(evaluation),
        **_wins(evaluation),
        **_accuracy(evaluation),
    )
    text = "\n\n".join(map(_wrapped, text.split("\n\n"))).rstrip() + "\n"
    path = docs / "questions.md"
    write_text(path, text)
    return path


def _wrapped(paragraph: str) -> str:
    if paragraph.startswith(("#", "!")):
        return paragraph
    return textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False)


def _image(docs: Path, name: str, text: str, drawing: Figure | None) -> str:
    if drawing is None:
        return f"*{text}: not measured by this run.*"
    path = save_svg(drawing, docs / "figures" / f"{name}.svg")
    return f"![{text}]({path.relative_to(docs).as_posix()})"


def _kept(evaluation: Evaluation) -> dict[str, str]:
    def listed(which: str, among: str = "value") -> str:
        found = kept(evaluation, which, among=among)
        return ", ".join(percent(found.get(turn)) for turn in TURNS)

    return {
        "turns": listed("without"),
        "turns_gatt": listed("with"),
        "turns_last": listed("last"),
        "turns_kind": listed("without", "kind"),
        "turns_kind_gatt": listed("with", "kind"),
        "turn_names": ", ".join(TURNS),
        "last_t1": percent(kept(evaluation, "without", "t1").get(TURNS[-1])),
        "last_gatt_t1": percent(kept(evaluation, "with", "t1").get(TURNS[-1])),
        "helpful_before": percent(rate(evaluation, gatt_base(evaluation), "helpful_rate"), 1),
        "helpful_after": percent(rate(evaluation, "gatt", "helpful_rate"), 1),
    }


def _switch(evaluation: Evaluation) -> dict[str, str]:
    last = last_version(evaluation)
    counted = [v for v in rlhf_versions(evaluation) if evaluation.get("switch", {}).get(v)]
    counts = evaluation["switch"][counted[-1]] if counted else {}
    total = sum(counts.values())

    def share(branch: str) -> str:
        return percent(counts.get(branch, 0) / total if total else None, 1)

    found = {
        "version_scored": title(counted[-1]) if counted else "the last version",
        "tagged": share("is_safety"),
        "unsafe": share("unsafe"),
        "untouched": share("helpfulness"),
        "last_name": title(last) if last else "the last version",
    }
    for name, key in (
        ("violation", "violation_rate"),
        ("refusal", "false_refusal_rate"),
        ("borderline", "borderline_refusal_rate"),
    ):
        found[f"{name}_sft"] = percent(rate(evaluation, "sft", key), 1)
        found[f"{name}_last"] = percent(rate(evaluation, last, key), 1)
    return found


def _wins(evaluation: Evaluation) -> dict[str, str]:
    def listed(decoding: str) -> str:
        rows = [
            (title(v), measured(evaluation, v, decoding)) for v in version_names(evaluation)[1:]
        ]
        shown = [f"{name} {_with_interval(row)}" for name, row in rows if row]
        return ", ".join(shown) or "not measured"

    return {
        "wins": listed("t1"),
        "wins_greedy": listed("greedy"),
        "ppo_gain": _ppo_gain(evaluation),
    }


def _ppo_gain(evaluation: Evaluation) -> str:
    """The last version's answers against those of the model that PPO began with."""
    found = evaluation.get("ppo", {})
    if not {"t1", "greedy"} <= found.keys():
        return "Its answers were not compared with those of the model before it."
    shown = []
    for decoding, how in (("t1", "at temperature 1"), ("greedy", "greedily")):
        low, high = found[decoding]["ci95"]
        verdict = "a gain" if low > 0.5 else "a loss" if high < 0.5 else "no difference shown"
        ends = f"{100 * low:.1f} to {100 * high:.1f}%"
        shown.append(f"{percent(found[decoding]['wins'], 1)} ({ends}: {verdict}) {how}")
    return (
        "Against the very model that PPO began with, on the same "
        f"{found['t1']['prompts']} prompts, its answers win {' and '.join(shown)}, ties counted "
        "half."
    )


def _with_interval(row: dict) -> str:
    value = percent(row.get("win_rate_vs_sft"))
    if not row.get("win_rate_ci95"):
        return value
    low, high = row["win_rate_ci95"]
    return f"{value} ({100 * low:.0f} to {100 * high:.0f}%)"


def _accuracy(evaluation: Evaluation) -> dict[str, str]:
    return {
        f"accuracy_{model}": ", ".join(
            percent(accuracies(evaluation, model).get(rating)) for rating in RATINGS
        )
        for model in ("helpfulness", "safety")
    }


def _ppo_run(config: dict, rows: Rows) -> str:
    steps, reward = series(rows, "reward")
    if not steps:
        return "It ran no PPO."
    names = (("batch", "batch"), ("lr", "learning rate"), ("beta", "beta"))
    chosen = ", ".join(f"{text} {config[key]:g}" for key, text in names if key in config)
    first, last = first_and_last(reward)
    ends = {key: series(rows, key)[1] for key in ("kl", "entropy")}
    shown = {key: f"{first_and_last(values)[1]:.2f}" for key, values in ends.items() if values}
    return (
        f"PPO ran for {len(steps)} iterations ({chosen or 'settings not noted'}). From the first "
        f"tenth of them to the last, the mean reward went from {first:.2f} to {last:.2f}, ending "
        f"at {shown['kl']} nats of KL an answer"
        + (f" and an entropy of {shown['entropy']} nats a token." if "entropy" in shown else ".")
    )


def _margin(config: dict) -> str:
    name = config.get("margin")
    return "a margin table that it did not note" if name is None else f"the margin table *{name}*"


if __name__ == "__main__":
    say(write_questions(Path(sys.argv[1]), Path(sys.argv[2])))
