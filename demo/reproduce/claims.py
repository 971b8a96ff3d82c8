"""What is compared, beside what the paper says of it: the questions as differences of two arms."""

from typing import NamedTuple

from puna.demo.reproduce.tables import Estimate


class Claim(NamedTuple):
    """One figure of one arm, minus that of another."""

    question: int
    what: str  # the figure, for people
    figure: str
    arm: str
    other: str
    paper: str  # what the paper says or measured
    sign: int = 0  # what it lets one expect of the difference: 1 above, -1 below, 0 nothing
    leads: bool = False  # stands in the short answer


NOT_SAID = "not compared"
ARGUED = "argued, no figure"

CLAIMS = (
    Claim(
        1, "twentieth answers that keep the instruction, held-out values", "kept value 20",
        "ghost", "rejection", "100% with, 0% without (Table 30, people)", 1, True,
    ),
    Claim(
        1, "twentieth answers that keep it, trained values", "kept seen 20", "ghost", "rejection",
        "100% with, 0% without (Table 30, people)", 1,
    ),
    Claim(
        1, "twentieth answers that keep a kind of instruction never trained on", "kept kind 20",
        "ghost", "rejection", "kept, too (A.3.5)", 1, True,
    ),
    Claim(
        1, "attention to the instruction, twentieth answers", "attention 20", "ghost", "rejection",
        "larger (Fig. 10)", 1,
    ),
    Claim(
        1, "sixth answers that keep it, held-out values", "kept value 6", "ghost", "rejection",
        "100% with, 0% without (Table 30, people)", 1,
    ),
    Claim(
        1, "twentieth answers, loss on the last answer alone", "kept value 20", "ghost",
        "ghost-unmasked", ARGUED, 1, True,
    ),
    Claim(
        1, "twentieth answers, repeated in every turn while sampling", "kept value 20", "ghost",
        "ghost-once", ARGUED, 1, True,
    ),
    Claim(
        1, "twentieth answers, only targets that obey", "kept value 20", "ghost",
        "ghost-unfiltered", "no filter is described", 0, True,
    ),
    Claim(
        1, "helpful answers to ordinary requests, greedy", "helpful greedy", "ghost", "rejection",
        NOT_SAID,
    ),
    Claim(
        1, "words said again rightly at temperature 1, after three versions", "repeat t1",
        "pool-all", "pool-last", "V3 lost rhyming, all versions' samples cured it; no figure", 1,
        True,
    ),
    Claim(
        1, "words said again rightly, greedy", "repeat greedy", "pool-all", "pool-last",
        "V3 lost rhyming, all versions' samples cured it; no figure", 1,
    ),
    Claim(
        1, "words said again rightly at temperature 1, against SFT", "repeat t1", "pool-last",
        "sft", "V3 lost rhyming; no figure", -1,
    ),
    Claim(
        2, "violations", "violations t1", "rejection", "helpfulness-alone",
        "one score may not serve two aims that conflict; no figure", -1, True,
    ),
    Claim(
        2, "helpful answers", "helpful t1", "rejection", "safety-alone",
        "one score may not serve two aims that conflict; no figure", 1, True,
    ),
    Claim(
        2, "violations", "violations t1", "rejection", "sum", NOT_SAID, 0, True,
    ),
    Claim(2, "helpful answers", "helpful t1", "rejection", "sum", NOT_SAID, 0),
    Claim(
        2, "false refusals of ordinary requests", "false refusals t1", "rejection", "sum", NOT_SAID,
    ),
    Claim(
        2, "refusals of what only sounds unsafe", "borderline refusals t1", "rejection", "sum",
        NOT_SAID,
    ),
    Claim(
        2, "violations", "violations t1", "rejection", "mixed",
        "one model on both may find it hard; no figure", -1, True,
    ),
    Claim(
        2, "helpful answers", "helpful t1", "rejection", "mixed",
        "one model on both may find it hard; no figure", 1,
    ),
    Claim(
        2, "helpfulness pairs in order, of a model of their own", "right all", "margin-small",
        "mixed-model", "63.2 of the helpfulness model; no mixed one", 1,
    ),
    Claim(
        2, "safety pairs in order, of a model of their own", "right safety", "auxiliary",
        "mixed-model", "64.5 of the safety model; no mixed one", 1,
    ),
    Claim(
        2, "pairs of two safe answers in order, a tenth of helpfulness comparisons mixed in",
        "right both safe", "auxiliary", "safety-pure",
        "especially beneficial there (3.2.2); no figure", 1,
    ),
    Claim(
        3, "wins over SFT, PPO on top", "wins t1", "on-top", "rejection",
        "V5 with PPO above V5 without, by its reward models and GPT-4 (Fig. 11)", 1, True,
    ),
    Claim(
        3, "wins over SFT, PPO on top, greedy", "wins greedy", "on-top", "rejection", NOT_SAID, 0,
        True,
    ),
    Claim(
        3, "wins over SFT, PPO on top, sampled at temperature 1.3", "wins t1", "on-top-warm",
        "rejection", "chosen again for each version, 1.2 to 1.3 after RLHF (Fig. 8); no figure", 1,
        True,
    ),
    Claim(
        3, "wins over SFT, PPO on top, sampled at temperature 1.3, greedy", "wins greedy",
        "on-top-warm", "rejection", NOT_SAID, 0, True,
    ),
    Claim(
        3, "wins over SFT, PPO on top by reward models that know its start", "wins t1",
        "on-top-again", "rejection", "annotators compare the newest models (3.2.1); no figure", 1,
        True,
    ),
    Claim(
        3, "wins over SFT, PPO on top by those, at temperature 1.3", "wins t1",
        "on-top-again-warm", "rejection",
        "both: the newest models are compared, the temperature chosen again; no figure", 1, True,
    ),
    Claim(
        3, "wins over SFT, PPO on top by those, at temperature 1.3, greedy", "wins greedy",
        "on-top-again-warm", "rejection", NOT_SAID,
    ),
    Claim(
        3, "wins over SFT, PPO on top by the oracle", "wins t1", "on-top-oracle", "rejection",
        NOT_SAID, 0, True,
    ),
    Claim(
        3, "wins over SFT, PPO on top by the oracle, greedy", "wins greedy", "on-top-oracle",
        "rejection", NOT_SAID,
    ),
    Claim(
        3, "reward of Eq. 4, PPO on top", "reward t1", "on-top", "rejection",
        "above, by its reward models (Fig. 11)", 1,
    ),
    Claim(
        3, "wins over SFT, equally many samples", "wins t1", "ppo", "rejection", NOT_SAID, 0, True,
    ),
    Claim(
        3, "wins over SFT, equally many samples, half by each", "wins t1", "both", "rejection",
        NOT_SAID,
    ),
    Claim(
        3, "wins over SFT, the best of K or any of K", "wins t1", "rejection", "lot",
        "the best gains with K (Fig. 7)", 1, True,
    ),
    Claim(3, "wins over SFT, any of K against none", "wins t1", "lot", "sft", NOT_SAID),
    Claim(
        3, "wins over SFT, without whitening", "wins t1", "ppo-unwhitened", "ppo",
        "whitening makes it stabler; no figure", -1,
    ),
    Claim(
        3, "reward of Eq. 4, without KL", "reward t1", "ppo-no-kl", "ppo",
        "the KL term keeps from reward hacking; no figure", 1,
    ),
    Claim(
        3, "wins over SFT, without KL", "wins t1", "ppo-no-kl", "ppo",
        "the KL term keeps from reward hacking; no figure", -1, True,
    ),
    Claim(
        3, "violations, the sum instead of the switch", "violations t1", "ppo-no-switch", "ppo",
        NOT_SAID,
    ),
    Claim(
        3, "wins over SFT, a second version of rejection sampling", "wins t1", "second",
        "rejection", "each version is better (Fig. 11)", 1,
    ),
    Claim(
        3, "wins over SFT, temperature chosen again", "wins t1", "second-temperature", "second",
        "chosen again for each version (Fig. 8); no figure", 1,
    ),
    Claim(
        4, "clear pairs in order, small margin", "right significantly_better", "margin-small",
        "margin-none", "79.1 to 80.4 (Table 28)", 1, True,
    ),
    Claim(
        4, "clear pairs in order, large margin", "right significantly_better", "margin-large",
        "margin-none", "79.1 to 80.7 (Table 28)", 1, True,
    ),
    Claim(
        4, "near ties in order, large margin", "right negligibly_better", "margin-large",
        "margin-none", "54.5 to 54.3 (Table 28)", -1, True,
    ),
    Claim(
        4, "all pairs in order, small margin", "right all", "margin-small", "margin-none",
        "62.5 to 63.0 (Table 28)", 1,
    ),
    Claim(
        4, "scores at the ends (below .05, above .95), large margin", "at the ends",
        "margin-large", "margin-none", "more, the larger the margin (Fig. 27)", 1,
    ),
    Claim(
        4, "unsafe answers below .5, auxiliary loss", "recall 0.5", "auxiliary", "no-auxiliary",
        "73.0 to 90.4 (Table 29)", 1, True,
    ),
    Claim(
        4, "unsafe answers below .15, auxiliary loss", "recall 0.15", "auxiliary", "no-auxiliary",
        NOT_SAID,
    ),
    Claim(
        4, "wins over SFT of PPO, large margin", "wins t1", "ppo-large-margin", "ppo",
        "may be sensitive to such scores; no figure", -1, True,
    ),
)  # fmt: skip


def verdict(claim: Claim, found: Estimate | None) -> str:
    """Whether the measured difference is what the paper lets one expect: in words."""
    if found is None:
        return "not measured"
    side = 1 if found.low > 0 else -1 if found.high < 0 else 0
    if not side:
        return "no difference shown"
    seen = "higher" if side > 0 else "lower"
    if not claim.sign:
        return f"{seen} here"
    return f"agrees: {seen}" if side == claim.sign else f"disagrees: {seen}"
