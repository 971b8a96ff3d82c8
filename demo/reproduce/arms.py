"""The arms: what each of the four questions compares.

They stand in the order in which they run, and an arm comes after those that it builds on. Every
question has its first seed before any has its second.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from puna.demo.reproduce import stages
from puna.demo.reproduce.stages import Stage

SFT = "sft"  # the model that the arms start from, itself measured
EXTRA_SEEDS = 2  # of what is cheap to train, or differs by little
TEMPERATURES = [0.8, 1.0, 1.2, 1.4]  # that a second version is let choose from
WARM = 1.3  # what RLHF's models sampled at (paper, Fig. 8: 1.2 to 1.3)


class Arm(NamedTuple):
    """One thing tried: a model made, and measured, for each seed."""

    name: str
    questions: tuple[int, ...]
    title: str
    stage: Stage
    measured: tuple[str, ...]  # of measures.MEASURES
    options: Mapping[str, Any] = {}
    start: str = SFT  # the arm whose model samples first or is trained on
    judges: Mapping[str, str] = {"helpfulness": "", "safety": ""}  # kind -> arm; "": the seed's
    extra: int = 0  # seeds beyond those asked for

    @property
    def needs(self) -> set[str]:
        """The arms whose models of the same seed it builds on."""
        return {self.start, *self.judges.values()} - {SFT, ""}


CHAT = ("answers",)
GHOST = ("answers", "instructions")
ALONE: Mapping[str, str] = {}

ARMS = (
    Arm(
        "rejection", (1, 2, 3), "rejection sampling, switch", stages.sample_best,
        ("answers", "instructions", "repeat", "branches"), extra=EXTRA_SEEDS,
    ),
    # Question 4: reward models. A seed's own are of the same settings as "small" and "with".
    Arm(
        "margin-none", (4,), "no margin", stages.judge, ("helpfulness pairs",),
        {"kinds": ("helpfulness",), "margin": "none"}, judges=ALONE, extra=EXTRA_SEEDS,
    ),
    Arm(
        "margin-small", (4, 2), "small margin", stages.judge,
        ("helpfulness pairs", "safety pairs"),
        {"kinds": ("helpfulness",), "margin": "small"}, judges=ALONE, extra=EXTRA_SEEDS,
    ),
    Arm(
        "margin-large", (4,), "large margin", stages.judge, ("helpfulness pairs",),
        {"kinds": ("helpfulness",), "margin": "large"}, judges=ALONE, extra=EXTRA_SEEDS,
    ),
    Arm(
        "auxiliary", (4, 2), "with the auxiliary loss", stages.judge, ("safety pairs",),
        {"kinds": ("safety",), "safety_weight": 0.5}, judges=ALONE, extra=EXTRA_SEEDS,
    ),
    Arm(
        "no-auxiliary", (4,), "without the auxiliary loss", stages.judge, ("safety pairs",),
        {"kinds": ("safety",), "safety_weight": 0.0}, judges=ALONE, extra=EXTRA_SEEDS,
    ),
    # Question 2: how two judgements become one reward.
    Arm(
        "safety-pure", (2,), "safety model without helpfulness comparisons", stages.judge,
        ("safety pairs",), {"kinds": ("safety",), "mix": [], "mix_share": None}, judges=ALONE,
        extra=EXTRA_SEEDS,
    ),
    Arm(
        "mixed-model", (2,), "one model on both kinds of comparisons", stages.judge,
        ("helpfulness pairs", "safety pairs"), {"kinds": ("helpfulness", "safety")}, judges=ALONE,
    ),
    Arm(
        "sum", (2,), "sum of both scores", stages.sample_best, CHAT, {"combine": "sum"},
    ),
    Arm(
        "mixed", (2,), "one mixed model", stages.sample_best, CHAT,
        judges={"helpfulness": "mixed-model"},
    ),
    Arm(
        "helpfulness-alone", (2,), "helpfulness model alone", stages.sample_best, CHAT,
        judges={"helpfulness": ""},
    ),
    Arm(
        "safety-alone", (2,), "safety model alone", stages.sample_best, CHAT,
        judges={"safety": ""},
    ),
    # Question 3: PPO. Equal prompts and equally many samples in the first four.
    Arm("ppo", (3, 4), "PPO alone", stages.improve, CHAT),
    Arm(
        "lot", (3,), "fine-tuning on one of K by lot", stages.sample_best, CHAT, {"lot": True},
    ),
    Arm(
        "half", (3,), "rejection sampling, half the samples", stages.sample_best, CHAT,
        {"prompts": "half"},
    ),
    Arm(
        "both", (3,), "half rejection sampling, half PPO", stages.improve, CHAT, {"share": 0.5},
        start="half",
    ),
    Arm(
        "on-top", (3,), "PPO on top of all of rejection sampling", stages.improve, CHAT,
        start="rejection", extra=EXTRA_SEEDS,
    ),
    Arm(
        "on-top-warm", (3,), "PPO on top, sampled at temperature 1.3", stages.improve, CHAT,
        {"temperature": WARM}, start="rejection", extra=EXTRA_SEEDS,
    ),
    # Whose fault it is where PPO on top does not help: its own, or that of the judges.
    Arm(
        "helpfulness-again", (3,), "helpfulness model of the second version", stages.judge_again,
        ("helpfulness pairs",), {"kind": "helpfulness"}, start="rejection", judges=ALONE,
        extra=EXTRA_SEEDS,
    ),
    Arm(
        "safety-again", (3,), "safety model of the second version", stages.judge_again,
        ("safety pairs",), {"kind": "safety"}, start="rejection", judges=ALONE, extra=EXTRA_SEEDS,
    ),
    Arm(
        "on-top-again", (3,), "PPO on top, by the second version's reward models", stages.improve,
        CHAT, start="rejection",
        judges={"helpfulness": "helpfulness-again", "safety": "safety-again"}, extra=EXTRA_SEEDS,
    ),
    Arm(
        "on-top-again-warm", (3,), "PPO on top, by those and at temperature 1.3", stages.improve,
        CHAT, {"temperature": WARM}, start="rejection",
        judges={"helpfulness": "helpfulness-again", "safety": "safety-again"}, extra=EXTRA_SEEDS,
    ),
    Arm(
        "on-top-oracle", (3,), "PPO on top, by the oracle", stages.improve, CHAT,
        {"critic": "policy"}, start="rejection", judges=ALONE, extra=EXTRA_SEEDS,
    ),
    Arm(
        "ppo-unwhitened", (3,), "PPO without whitening", stages.improve, CHAT, {"whiten": False},
    ),
    Arm(
        "ppo-no-kl", (3,), "PPO without KL", stages.improve, CHAT, {"beta": 0.0, "max_kl": None},
    ),
    Arm(
        "ppo-no-switch", (3,), "PPO on the sum instead of the switch", stages.improve, CHAT,
        {"combine": "sum"},
    ),
    Arm(
        "second", (3,), "second version, temperature 1", stages.sample_best, CHAT,
        {"prompts": "second"}, start="rejection",
    ),
    Arm(
        "second-temperature", (3,), "second version, temperature chosen again",
        stages.sample_best, CHAT, {"prompts": "second", "temperatures": TEMPERATURES},
        start="rejection",
    ),
    Arm(
        "ppo-large-margin", (4,), "PPO on a model with the large margin", stages.improve, CHAT,
        judges={"helpfulness": "margin-large", "safety": ""},
    ),
    # Question 1: forgetting. Ghost Attention goes on from rejection sampling.
    Arm(
        "ghost", (1,), "Ghost Attention", stages.keep_instructions, GHOST, start="rejection",
        judges=ALONE,
    ),
    Arm(
        "ghost-unmasked", (1,), "loss on all answers", stages.keep_instructions, GHOST,
        {"mask": False}, start="rejection", judges=ALONE,
    ),
    Arm(
        "ghost-once", (1,), "not repeated while sampling",
        stages.keep_instructions, GHOST, {"repeat": False, "window": 0}, start="rejection",
        judges=ALONE,
    ),
    Arm(
        "ghost-unfiltered", (1,), "unfiltered", stages.keep_instructions, GHOST,
        {"filtered": False}, start="rejection", judges=ALONE,
    ),
    Arm(
        "pool-all", (1,), "three versions, best of all", stages.loop_unseen, ("repeat",),
        {"pool": "all"},
    ),
    Arm(
        "pool-last", (1,), "three versions, best of the last", stages.loop_unseen, ("repeat",),
        {"pool": "last"},
    ),
)  # fmt: skip
BY_NAME = {arm.name: arm for arm in ARMS}


def title_of(name: str) -> str:
    """An arm's name for people."""
    return "SFT" if name == SFT else BY_NAME[name].title


def planned(seeds: int) -> list[tuple[Arm, int]]:
    """(arm, seed) of a whole run, in order: all arms of a seed before any of the next."""
    rows = [(arm, seed) for seed in range(seeds) for arm in ARMS]
    return rows + [(arm, seed) for arm in ARMS for seed in range(seeds, seeds + arm.extra)]
