"""K answers to each prompt, and nothing trained: the first half of rejection sampling, on its own.

With reward models the best are kept as `puna rejection` keeps them (paper section 3.2.3), so that
another machine can train another model on them: `puna rejection --selected FOLDER/selected.jsonl
--policy SMALL` is the paper's "large to small". Without, the answers have no scores; `puna score
--data FOLDER/samples.jsonl` gives them some, and `puna rejection --pools` chooses among them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from puna.core import parallel
from puna.core.documents import count_of
from puna.core.terminal import say
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.prompts import common_tokenizer, load_prompts
from puna.trainers.rl.best_of import POOL, SAMPLES, SELECTED, keep_best
from puna.trainers.rl.config import (
    BestOfConfig,
    check_reward,
    frozen,
    open_reward_models,
    prompt_room,
    reward_paths,
)
from puna.trainers.rl.rewards import Reward, RewardModels
from puna.trainers.rl.sampling import drawing_at_best, drawing_of, sample_all
from puna.trainers.train import next_token, written
from puna.trainers.train.claim import owned
from puna.trainers.train.command import command
from puna.trainers.train.notice import notice


@dataclass(kw_only=True)
class SampleConfig(BestOfConfig):
    """Draw K answers to each prompt; with reward models, keep the best (paper section 3.2.3)."""


def run(config: SampleConfig, reward: Reward | None = None) -> Path:
    """Sample, or continue, in `config.out`; returns the file of the answers.

    samples.jsonl has all answers; where they are scored, by reward models or by the function
    `reward`, selected.jsonl has the best finished one to each prompt, pool.jsonl the best few and
    selection.json what drawing more of them bought (Fig. 7).
    """
    scored = reward is not None or bool(reward_paths(config))
    if scored:
        check_reward(config, reward)
    elif (config.combine, config.safety_threshold, config.pool_samples, config.temperatures) != (
        ("switch", 0.15, 4, [])
    ):
        raise ValueError(
            "combine, safety_threshold, pool_samples and temperatures are of scored answers: name "
            "reward models (helpfulness, safety) or leave them out"
        )
    tokenizer = Tokenizer(common_tokenizer(config.policy, *reward_paths(config)))
    with owned(config, given={"reward": reward}):
        names = (SELECTED, POOL) if scored else ()
        parallel.on_main(lambda: written.check(config.out, *names))
        if parallel.broadcast((config.out / SELECTED).exists()):
            notice(f"{config.out} is finished; {SELECTED} has the best answers")
            return config.out / SAMPLES
        draw(config, tokenizer, open_reward_models(config) if scored and reward is None else reward)
        if scored:
            found = parallel.on_main(lambda: keep_best(config.out, config))
            if parallel.is_main():
                say(
                    f"kept the best of {count_of(config.samples, 'answer')} to {found['kept']:,} "
                    f"of {count_of(found['prompts'], 'prompt')}: mean score "
                    f"{found['score_kept']:.3f}, of all answers {found['score_sampled']:.3f}"
                )
        else:
            notice(f"{config.out / SAMPLES} has all answers")
    return config.out / SAMPLES


def draw(config: SampleConfig, tokenizer: Tokenizer, reward: Reward | None) -> None:
    """The answers that are missing."""
    policy = frozen(config.policy, "lm", config)
    context = policy.config.context
    if isinstance(reward, RewardModels):
        context = min(context, reward.context)
    prompts, skipped = load_prompts(config.prompts, tokenizer, prompt_room(config, context), config)
    next_token.say(skipped)
    drawing = drawing_of(config, tokenizer)
    if reward is not None:
        drawing = drawing_at_best(config.out, config, tokenizer, policy, prompts, reward)
    sample_all(config.out / SAMPLES, drawing, tokenizer, policy, prompts, reward)


def main() -> int:
    return command("python -m puna.trainers.sample", SampleConfig, run)


if __name__ == "__main__":
    sys.exit(main())
