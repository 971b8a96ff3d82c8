"""What stands under each figure of the report: a sentence on the paper, one on this run.

Plain text; the numbers of this run come from its evaluation.
"""

from puna.core.documents import count_of
from puna.demo.report.results import (
    KEPT_AMONG,
    RATINGS,
    REWARD_MODELS,
    Evaluation,
    Rows,
    accuracies,
    first_and_last,
    kept,
    kept_count,
    last_version,
    percent,
    rate,
    rlhf_versions,
    series,
    title,
)


def losses(pretrain: Rows, sft: Rows) -> str:
    here = []
    for name, rows in (("pretraining", pretrain), ("SFT", sft)):
        held, train = (series(rows, key)[1] for key in ("eval_loss", "loss"))
        if train:
            ends = f"{first_and_last(train)[1]:.2f}"
            ends += f" (held-out {held[-1]:.2f})" if held else ""
            here.append(f"{name} ends at {ends} nats a token")
    return (
        "The paper sees no saturation after two trillion tokens (section 2, Fig. 5) and trains SFT "
        "for two epochs with loss on answer tokens only (3.1). "
        f"Here {' and '.join(here)}, on text and dialogues of a small made-up world."
    )


def reward_accuracy(evaluation: Evaluation) -> str:
    def ends(model: str) -> str:
        found = accuracies(evaluation, model)
        clear, unclear = percent(found.get(RATINGS[-1])), percent(found.get(RATINGS[0]))
        return f"the {model} model orders {unclear} of the near ties and {clear} of the clear pairs"

    here = " and ".join(ends(model) for model in REWARD_MODELS)
    return (
        "The paper's models are the better the clearer the annotator's choice was (section 3.2.2, "
        f"Table 8). Here {here}, on held-out comparisons that the oracle graded with noise; thin "
        "lines are 95% intervals, the dashed one is guessing."
    )


def calibration(evaluation: Evaluation) -> str:
    return (
        "The paper finds its scores calibrated against human ratings (section 3.2.2, Fig. 29), and "
        "Eq. 1 reads the sigmoid of a score difference as the chance of being preferred. Here each "
        "held-out pair is seen from both sides: a model above the dashed line on the right half is "
        "too timid, one below it too sure."
    )


def reward_rounds(evaluation: Evaluation) -> str:
    models = evaluation.get("reward_models", {})
    found = []
    for model in REWARD_MODELS:
        rows = models.get(model, {}).get("rounds", [])
        shares = [f"{row['before']:.0%}" for row in rows if row.get("before") is not None]
        if shares:
            found.append(f"{' and '.join(shares)} of the pairs ({model})")
    here = f"order {', '.join(found)}" if found else "were never asked, there was one round only"
    return (
        "The paper collects fresh comparisons from the newest model every round, because a reward "
        "model is soon asked about answers unlike those it has seen (section 3.2.1). "
        f"Here, on a new batch before they had seen it (hollow), the earlier round's models {here};"
        " filled is the same batch after training on it, so no longer held out."
    )


def reward_distribution(evaluation: Evaluation) -> str:
    return (
        "In the paper the tail of low scores disappears from SFT to the RLHF versions (section "
        "3.4, Fig. 20; for safety 4.2.3, Fig. 15). Here the last reward models score every "
        "version's answers at temperature 1, helpfulness on ordinary and safety on unsafe "
        "requests; ticks are medians, and the dashed line is where Eq. 4 stops trusting an answer."
    )


def win_rates(evaluation: Evaluation) -> str:
    versions = rlhf_versions(evaluation)
    here = ", ".join(
        f"{title(v)} {percent(rate(evaluation, v, 'win_rate_vs_sft'))}" for v in versions
    )
    greedy = percent(rate(evaluation, last_version(evaluation), "win_rate_vs_sft", "greedy"))
    return (
        "In the paper versions win more and more often, most of all when PPO joins (section 3.4, "
        f"Fig. 11). Here the oracle, not a reward model, compares with SFT: {here} at "
        f"temperature 1; greedy decoding, where a merely sharper distribution gains nothing, shows "
        f"{greedy} for the last."
    )


def version_rates(evaluation: Evaluation) -> str:
    def change(key: str) -> str:
        first, last = (rate(evaluation, v, key) for v in ("sft", last_version(evaluation)))
        return f"{percent(first)} to {percent(last)}"

    return (
        "More safety data makes the paper's models safer at no cost in helpfulness, but they "
        "refuse more requests that only sound unsafe (section 4.2.3, Fig. 15 and 33). Here, from "
        f"SFT to the last RLHF version, violations go from {change('violation_rate')}, helpful "
        f"answers from {change('helpful_rate')}, false refusals from "
        f"{change('false_refusal_rate')} and refusals of borderline requests from "
        f"{change('borderline_refusal_rate')} (lines: temperature 1, hollow: greedy)."
    )


def switch_branches(evaluation: Evaluation) -> str:
    rescued = {
        title(v): counts["unsafe"] / sum(counts.values())
        for v, counts in evaluation.get("switch", {}).items()
        if sum(counts.values())
    }
    here = ", ".join(f"{percent(share, 1)} for {name}" for name, share in rescued.items())
    return (
        "Eq. 4 takes the safety model's score for tagged prompts and for answers that it gives "
        "less than 0.15, else the helpfulness model's (section 3.2.3). Here the second clause, "
        f"which guards prompts that nobody tagged, caught {here} of all answers scored."
    )


def best_of_k(evaluation: Evaluation) -> str:
    gains = [
        f"{rows[-1]['best'] - rows[0]['best']:+.2f} for {title(v)}"
        for v, rows in evaluation.get("best_of_k", {}).items()
        if rows
    ]
    return (
        "The best of more samples has a higher reward while the median stays flat, and the gap is "
        "what rejection sampling can teach (section 3.2.3, Fig. 7). Here going from one answer to "
        f"all of them raises the best one's reward by {', '.join(gains)}."
    )


def ppo(rows: Rows) -> str:
    first, last = first_and_last(series(rows, "reward")[1])
    _, kl = series(rows, "kl")
    return (
        "The paper runs PPO for 200 to 400 iterations from the best rejection-sampling model, held "
        "near it by a KL penalty, and gives no curves (section 3.2.3, Eq. 4). "
        f"Here the mean reward goes from {first:.2f} in the first tenth of the iterations to "
        f"{last:.2f} in the last, at a distance of {first_and_last(kl)[1]:.2f} nats an answer."
    )


def instruction_kept(evaluation: Evaluation) -> str:
    without, with_gatt = kept(evaluation, "without"), kept(evaluation, "with")
    return (
        "Without Ghost Attention the paper's model loses an instruction within a few turns and "
        "with it keeps it for twenty (section 3.3, Table 30). "
        f"Here, greedy, the share falls from {percent(without.get('1'))} in the first to "
        f"{percent(without.get('20'))} in the twentieth answer without it, and is "
        f"{percent(with_gatt.get('1'))} and {percent(with_gatt.get('20'))} with it; each measured "
        "answer is to a question that can show whether the instruction is kept. The instructions' "
        f"values are held out from all training{_dialogues(evaluation)}. Only answers that pass "
        "the oracle's `keeps` became Ghost Attention's training targets, and the same oracle "
        "measures here."
    )


def instruction_attention(evaluation: Evaluation) -> str:
    found = evaluation.get("gatt_attention", {})

    def ends(which: str) -> str:
        row = found.get(which, {})
        first, last = (row.get(turn) for turn in ("1", "20"))
        return "not measured" if None in (first, last) else f"{first:.2f} to {last:.2f}"

    return (
        "The paper shows that with Ghost Attention the system message keeps a large attention over "
        "more of the dialogue (Fig. 10). Here, from the first to the twentieth answer, the largest "
        "weight that any head gives to the instruction, averaged over the answer's tokens, goes "
        f"from {ends('with')} with it and from {ends('without')} without."
    )


def _dialogues(evaluation: Evaluation) -> str:
    count = kept_count(evaluation)
    return f" ({count_of(count, 'dialogue')})" if count else ""


def instruction_kept_among(evaluation: Evaluation) -> str:
    def twentieth(among: str) -> str:
        with_gatt, without = (
            percent(kept(evaluation, which, among=among).get("20")) for which in ("with", "without")
        )
        count = kept_count(evaluation, among)
        behind = f", {count_of(count, 'dialogue')}" if count else ""
        return f"{with_gatt} for {KEPT_AMONG[among]} (without {without}{behind})"

    return (
        "The paper finds that the model keeps constraints that Ghost Attention did not train on "
        "(section 3.3, A.3.5). Here, greedy with Ghost Attention, the twentieth answer keeps "
        f"{', '.join(map(twentieth, KEPT_AMONG))}. The fourth kind, a drink, occurs in "
        "fine-tuning's short dialogues with other values and never in Ghost Attention's data."
    )


def headline(evaluation: Evaluation, took: str | None) -> str:
    """The run in one sentence, of what it measured."""
    last = last_version(evaluation)
    parts = []
    if (wins := rate(evaluation, last, "win_rate_vs_sft")) is not None:
        parts.append(f"its answers win {wins:.0%} of comparisons with the fine-tuned model's")
    unsafe = [rate(evaluation, v, "violation_rate") for v in ("sft", last)]
    if None not in unsafe:
        parts.append(f"it helps with {unsafe[1]:.0%} of unsafe requests instead of {unsafe[0]:.0%}")
    ends = [kept(evaluation, which).get("20") for which in ("with", "without")]
    if None not in ends:
        parts.append(
            f"with Ghost Attention it keeps an instruction in {ends[0]:.0%} of twentieth answers "
            f"instead of {ends[1]:.0%}"
        )
    count = evaluation.get("parameters")
    size = f"a model of {count / 1e6:.1f} million parameters" if count else "a small model"
    if not parts:
        return f"The pipeline ran on {size}; this run measured too little for a result."
    learned = f"In {took} on this machine, {size} went" if took else f"{size.capitalize()} went"
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"
    through = count_of(len(rlhf_versions(evaluation)), "round")
    return f"{learned} from raw text through SFT and {through} of RLHF: {listed}."
