"""What rejection sampling and PPO are configured with: whose answers, judged by whom, and how."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from puna.core.checkpoint.folder import open_model
from puna.core.documents import count_of
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.columns import ReadingMessages
from puna.trainers.rl.engine import Engine, check_url
from puna.trainers.rl.rewards import Reward, RewardModels
from puna.trainers.train import loop
from puna.trainers.train.kinds import FIXED, FREE, Kind
from puna.trainers.train.layout import Parallel
from puna.trainers.train.ranges import (
    Above,
    Batch,
    Below,
    Count,
    CountOrZero,
    Rate,
    Seed,
    Share,
    Temperature,
    Weight,
)


@dataclass(kw_only=True)
class EngineConfig(loop.DrawingConfig):
    """How answers are drawn, and by whom."""

    engine: str = ""
    """address of a vLLM server that draws the answers, http://127.0.0.1:8000 (docs/runs.md): it
    takes the model's weights from the folder `engine` in `out`; left out: this process draws"""

    def check(self) -> None:
        if self.engine:
            check_url(self.engine)


@dataclass(kw_only=True)
class AnsweringConfig(EngineConfig, loop.FolderConfig, ReadingMessages):
    """Options of a stage that samples answers."""

    policy: Path
    """model that answers"""
    prompts: list[Path]
    """prompt files to sample from"""
    temperature: Temperature = 1.0
    """of the answers"""
    max_new_tokens: Count = 512
    """longest answer, tokens"""
    micro_batch_tokens: Annotated[Count, FREE] = 16384
    """most tokens in one forward pass over answers"""


@dataclass(kw_only=True)
class SamplingConfig(AnsweringConfig):
    """Options of a stage that samples answers and has them scored."""

    helpfulness: Path | None = None
    """helpfulness reward model; from Python a reward function can stand for both"""
    safety: Path | None = None
    """safety reward model; with only one of the two, that one scores every answer"""
    combine: Literal["switch", "sum"] = "switch"
    """how two scores become one: Eq. 4's switch (paper), or their sum"""
    safety_threshold: Annotated[float, Above(0), Below(1)] = 0.15
    """the switch takes the safety score where its sigmoid is below this (paper: 0.15)"""


@dataclass(kw_only=True)
class BestOfConfig(SamplingConfig):
    """Options of a stage that samples K answers to each prompt and keeps the best."""

    pool_samples: Annotated[Count, FIXED] = 4
    """best answers to a prompt that are handed on in pool.jsonl: later reward models may prefer
    another than today's"""
    round: Count = 1
    """number of this RLHF version; part of the random numbers"""
    samples: Annotated[Batch, FIXED] = 20
    """K, answers to each prompt (paper: not said; its Fig. 26 uses 20)"""
    temperature: Temperature = 1.2
    """of the answers (paper: 1.2 to 1.3 is best for its RLHF model)"""
    temperatures: list[Temperature] = field(default_factory=list)
    """tried first, each on one chunk of prompts: the one whose best answers score highest takes the
    place of `temperature` (paper: chosen anew for every version; Fig. 8)"""
    chunk: Annotated[Batch, FIXED] = 64
    """prompts sampled and scored at a time, all processes together; an interruption loses at most
    one chunk"""


@dataclass(kw_only=True)
class ImitationConfig(loop.RowsConfig, ReadingMessages):
    """Options of a stage that fine-tunes on answers that it has selected: the first of its bases,
    so that its learning rate wins over `TrainConfig`'s, which the others bring."""

    mix: list[Path] = field(default_factory=list)
    """demonstrations to train on besides: of skills that the selection does not judge and that
    would otherwise be forgotten"""
    epochs: Count = 2
    """passes over the selected answers"""
    lr: float = 2e-5
    """peak (the paper does not say; this is SFT's)"""
    row_tokens: CountOrZero = 0
    """tokens in a row; 0 takes the model's context"""
    truncate: bool = False
    """cut dialogues of `mix` and answers that are longer than a row; off: they are skipped"""


@dataclass(kw_only=True)
class PPOConfig(SamplingConfig, loop.TrainConfig):
    """Proximal policy optimisation (paper section 3.2.3; its values are the defaults)."""

    policy: Path
    """model to start from, which is also the reference of the KL term"""
    eval_prompts: list[Path] = field(default_factory=list)
    """prompt files for held-out reward and early stopping"""
    eval_count: Count = 512
    """held-out prompts per evaluation"""
    temperature: Temperature = 1.0
    """of the answers; all log-probs are taken at it"""
    iterations: Count = 400
    """rollouts (paper: 200-400, stopped early)"""
    batch: Batch = 512
    """answers per iteration, all ranks together (paper)"""
    minibatch: Batch = 64
    """answers per gradient step (paper)"""
    beta: Weight = 0.01
    """weight of KL (paper: 0.01 for 7b and 13b, 0.005 for 34b and 70b)"""
    whiten: bool = True
    """scores are whitened over the batch before KL is subtracted (paper, Eq. 4)"""
    ratio_clip: Rate = 0.2
    """half width of the interval around ratio 1 (paper)"""
    lr: float = 1e-6
    """constant (paper)"""
    schedule: Literal["cosine", "constant"] = "constant"
    critic_lr: Rate | None = None
    """the critic's learning rate; the policy's where left out"""
    critic: Annotated[Literal["helpfulness", "policy"], FIXED] = "helpfulness"
    """whose weights the critic starts from, with a fresh head"""
    critic_warmup: CountOrZero = 0
    """iterations at the beginning that train the critic alone"""
    value_clip: Rate | None = 0.2
    """how far a value may move since the rollout; in units of the whitened reward"""
    gamma: Share = 1.0
    """discount per token"""
    lam: Share = 0.95
    """of generalised advantage estimation"""
    unfinished: Literal["keep", "subtract", "replace", "mask"] = "subtract"
    """an answer without EOS: keep its score; subtract the penalty; replace the score by minus
    the penalty; mask it out of loss and whitening"""
    unfinished_penalty: Weight = 1.0
    """in units of the raw score"""
    patience: CountOrZero = 0
    """stop after so many evaluations without a better held-out reward and take the best model; 0:
    go on to the end and take the last"""
    max_kl: Rate | None = None
    """stop when the mean KL of an answer, in nats, exceeds it, and take the best model within it:
    the policy is looked at every eval_every iterations"""
    stop_on_collapse: bool = True
    """stop, and take the best model, when answers are a fifth as long as at first, half of them
    no longer end, or a prompt has but one answer"""
    ratio_tolerance: Rate | None = None
    """largest mean |log ratio| of an iteration's first mini-batch; left out: 1e-3, in bf16 2e-2"""
    save_every: int = 20
    eval_every: Annotated[Count, Kind.AMENDED] = 10
    """iterations between looks at held-out prompts, and at whether the policy is the best so far"""

    def check(self) -> None:
        super().check()
        if self.batch % self.minibatch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of minibatch {self.minibatch}; "
                "one pass in equal gradient steps needs that"
            )
        if self.critic_warmup >= self.iterations:
            raise ValueError(
                f"critic_warmup {self.critic_warmup} leaves none of "
                f"{count_of(self.iterations, 'iteration')} to train the policy; lower it"
            )
        if self.patience and not self.eval_prompts:
            raise ValueError("patience needs eval_prompts to look at; name some or set it to 0")


@dataclass(kw_only=True)
class RLHFConfig(EngineConfig, ReadingMessages):
    """The loop V1..Vn: comparisons, reward models, rejection sampling, PPO in the last ones."""

    out: Path
    """folder of the loop; an interrupted loop in it is continued"""
    model: Path
    """the SFT model that V1 starts from"""
    prompts: list[Path]
    """prompts for rejection sampling and PPO; their `safety` is Eq. 4's is_safety"""
    rejection_prompts: list[Path] = field(default_factory=list)
    """further prompts, for rejection sampling alone, in every round"""
    ppo_prompts: list[Path] = field(default_factory=list)
    """further prompts, for PPO alone"""
    eval_prompts: list[Path] = field(default_factory=list)
    """prompts for PPO's held-out reward and early stopping"""
    student: Path | None = None
    """smaller SFT model that is fine-tuned on every version's selected answers besides (paper: the
    70b's answers train the other sizes)"""
    helpfulness_prompts: list[Path] = field(default_factory=list)
    """prompts whose answers are compared for helpfulness"""
    safety_prompts: list[Path] = field(default_factory=list)
    """prompts whose answers are compared for safety"""
    helpfulness_data: list[Path] = field(default_factory=list)
    """further comparisons, used in every round"""
    safety_data: list[Path] = field(default_factory=list)
    """further comparisons, used in every round"""
    round_prompts: CountOrZero = 0
    """prompts that one round's rejection sampling takes, each round the next of a shuffled order
    (the best answers to earlier ones stay in the pool); 0: all of them every time"""
    pool: Literal["all", "last"] = "all"
    """whose samples a version chooses from: those of all versions so far, or of the last alone
    (paper: V3 was trained so and had lost skills, rhyming for one)"""
    versions: Count = 5
    """V1 .. Vn (paper: 5)"""
    gatt_version: Annotated[CountOrZero, FIXED] = 0
    """Ghost Attention follows on the rejection sampling of this version, and later versions are
    fine-tuned from its model (paper: 3); 0: there is none"""
    gatt_dialogues: list[Path] = field(default_factory=list)
    """dialogues for it, as `puna gatt` reads them"""
    gatt_answers: Annotated[CountOrZero, FIXED] = 0
    """the version's selected answers that are mixed in, the first so many; 0: all"""
    ppo_versions: CountOrZero = 1
    """so many of the last versions end with PPO (paper: V5; V4 is unclear)"""
    helpfulness_pairs: Count = 2000
    """comparisons a round"""
    safety_pairs: Count = 1000
    """comparisons a round"""
    annotations: Annotated[Path | None, FREE] = None
    """file of people's comparisons (puna annotate): each round's are asked for there and waited
    for; left out: pairs are written for an annotator of your own"""
    temperatures: list[Temperature] = field(default_factory=lambda: [0.8, 1.0, 1.2])
    """the answers to compare are drawn at one of these"""
    chunk: Annotated[Batch, FIXED] = 512
    """answers to compare that are drawn at a time, all processes together; an interruption loses at
    most one chunk"""
    max_new_tokens: Count = 512
    """longest answer, tokens"""
    go_on: bool = False
    """train the reward models on from the last round's with fresh data only (the paper starts
    anew from the chat model on all data)"""
    seed: Annotated[Seed, FIXED] = 0
    amend: Annotated[bool, FREE] = False
    """go on with other options or prompts from here on; what is sampled and annotated stays"""
    device: Annotated[str, FREE] = "auto"
    timeout: Annotated[float, Above(0), FREE] = 1800.0
    """seconds that ranks wait for each other"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """of the matrix products in what this loop samples and scores itself; each stage has its own"""
    parallel: Annotated[Parallel, FREE] = field(default_factory=Parallel)
    """how every stage's model is shared out, where the stage's own table does not say"""
    reward: dict[str, Any] = field(default_factory=dict)
    """table: options of `puna reward` for both reward models; a mix_share without mix is drawn from
    the other model's comparisons (paper: a tenth of helpfulness for the safety model)"""
    helpfulness: dict[str, Any] = field(default_factory=dict)
    """table: further options for the helpfulness model"""
    safety: dict[str, Any] = field(default_factory=dict)
    """table: further options for the safety model"""
    rejection: dict[str, Any] = field(default_factory=dict)
    """table: options of `puna rejection`"""
    gatt: dict[str, Any] = field(default_factory=dict)
    """table: options of `puna gatt`"""
    ppo: dict[str, Any] = field(default_factory=dict)
    """table: options of `puna ppo`"""

    def check(self) -> None:
        super().check()
        if self.ppo_versions > self.versions:
            raise ValueError(
                f"versions is {self.versions} and ppo_versions {self.ppo_versions}; there must "
                "not be more with PPO than there are"
            )
        if self.gatt_version > self.versions:
            raise ValueError(
                f"gatt_version is {self.gatt_version} and versions is {self.versions}; "
                "name one of them, or 0"
            )
        if not self.gatt_version and (self.gatt or self.gatt_answers):
            raise ValueError(
                "gatt and gatt_answers are of Ghost Attention; set gatt_version or leave them out"
            )
        if not self.temperatures:
            raise ValueError("temperatures is empty; name at least one to draw answers at")
        if self.ppo_versions and self.ppo.get("patience") and not self.eval_prompts:
            raise ValueError(
                "patience in [ppo] needs eval_prompts to look at; name some or set it to 0"
            )


# Table of a stage in the loop's recipe -> option that cannot stand there, and why.
SET_BY_THE_LOOP = {
    "reward": {
        "out": "it is under the loop's own `out`",
        "model": "reward models start from the newest chat model",
        "data": "use `helpfulness_data` and `safety_data`",
    },
    "rejection": {
        "out": "it is under the loop's own `out`",
        "policy": "the newest version samples",
        "helpfulness": "the round's own reward models score",
        "safety": "the round's own reward models score",
        "prompts": "use `prompts` and `rejection_prompts`",
        "student": "use the loop's own `student`",
        "pools": "use the loop's own `pool`",
        "selected": "use the loop's own `student`",
        "round": "the loop counts",
    },
    "gatt": {
        "out": "it is under the loop's own `out`",
        "model": "it goes on from the version's rejection sampling",
        "dialogues": "use the loop's own `gatt_dialogues`",
    },
    "ppo": {
        "out": "it is under the loop's own `out`",
        "policy": "PPO goes on from what the round has made before",
        "helpfulness": "the round's own reward models score",
        "safety": "the round's own reward models score",
        "prompts": "use `prompts` and `ppo_prompts`",
        "eval_prompts": "use the loop's own `eval_prompts`",
    },
}


def engine_of(config: Any, tokenizer: Tokenizer) -> Engine | None:
    """The server that draws, where an EngineConfig with `out` and `timeout` names one; ValueError
    for an address that is none."""
    if not config.engine:
        return None
    return Engine(config.engine, config.out / "engine", tokenizer, timeout=config.timeout)


def frozen(path: Path, head: str, config: loop.FolderConfig, tp: int = 1) -> Transformer:
    """A model to look with, not to train; `tp` neighbouring ranks show it the same rows."""
    return loop.load(open_model(path, head=head), config, frozen=True, tp=tp)


def open_reward_models(config: SamplingConfig, tp: int = 1) -> RewardModels:
    """The default reward, Eq. 4; ValueError where no reward model is named."""
    return RewardModels(
        frozen(config.helpfulness, "score", config, tp) if config.helpfulness else None,
        frozen(config.safety, "score", config, tp) if config.safety else None,
        combine=config.combine,
        threshold=config.safety_threshold,
        max_tokens=config.micro_batch_tokens,
    )


def reward_paths(config: SamplingConfig) -> list[Path]:
    """The reward models that are named."""
    return [path for path in (config.helpfulness, config.safety) if path is not None]


def check_reward(config: SamplingConfig, reward: Reward | None) -> None:
    """ValueError unless answers are scored by either reward models or a function handed over."""
    if reward is not None and reward_paths(config):
        raise ValueError("a reward function stands for the reward models: leave their paths out")
    if reward is not None and (config.combine, config.safety_threshold) != ("switch", 0.15):
        raise ValueError(
            "combine and safety_threshold are of the two reward models: a reward function does as "
            "it says; leave them out"
        )
    if reward is None and not reward_paths(config):
        raise ValueError("name a reward model (helpfulness, safety) or hand a reward function over")


def prompt_room(config: AnsweringConfig | RLHFConfig, context: int) -> int:
    """Tokens that a prompt may have; ValueError where the answer leaves none of `context`."""
    room = context - config.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in the models' "
            f"context of {context}; lower it"
        )
    return room
