"""Llama 2, the whole paper, from scratch. As a library:

    load, Llama                        a model with its tokenizer: generate, stream, logprobs, score
    Memory                             of a chat, so that each turn computes its new tokens only
    pretrain, sft, reward, rejection,
    ppo, gatt, distill, rlhf           the stages; each takes its configuration, SFTConfig and so on
    sample, score                      answers and their rewards, in the same way
    evaluate, evaluate_chat            measures of reward models and of chat models
    Tokenizer, train_tokenizer, convert, Message, Answer, next_token_loss

Each is imported when it is asked for: `import puna` alone does not import PyTorch.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the rooms stand beside this folder, not in it: found there without an installation,
# and where an installed wheel's own are hidden behind this folder.
_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "setup.py").is_file():
    __path__.append(str(_CHECKOUT))

# How often OpenMP's threads look for each other before they sleep, some 100 us; PyTorch's OpenMP
# reads it when it is loaded. Its own 300,000 are milliseconds: beside as many busy processes as
# threads, training then kept .4 to .8 of its fair share, and keeps .8 or more. Alone it is as fast.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# `python -m puna.trainers.sft` and its like: this is imported before all that takes long.
if any(word.startswith("puna.") for word in sys.orig_argv[1:4]) and sys.argv[:1] == ["-m"]:
    import_module("puna.core.starting").begins()

if TYPE_CHECKING:  # the same as PLACES, for type checkers and editors
    from puna.core.checkpoint.convert import convert
    from puna.core.generation.memory import Memory
    from puna.core.llama import Llama, load
    from puna.core.text.chat import Message
    from puna.core.text.tokenizer import Tokenizer, train_tokenizer
    from puna.trainers.distill import DistillConfig
    from puna.trainers.distill import run as distill
    from puna.trainers.evaluate import EvaluateConfig
    from puna.trainers.evaluate import run as evaluate
    from puna.trainers.evaluation.chat import run as evaluate_chat
    from puna.trainers.evaluation.config import EvaluateChatConfig
    from puna.trainers.gatt import GAttConfig
    from puna.trainers.gatt import run as gatt
    from puna.trainers.ppo import PPOConfig
    from puna.trainers.ppo import run as ppo
    from puna.trainers.pretrain import PretrainConfig
    from puna.trainers.pretrain import run as pretrain
    from puna.trainers.rejection import RejectionConfig
    from puna.trainers.rejection import run as rejection
    from puna.trainers.reward import RewardConfig
    from puna.trainers.reward import run as reward
    from puna.trainers.rl.rewards import Answer
    from puna.trainers.rlhf import RLHFConfig
    from puna.trainers.rlhf import run as rlhf
    from puna.trainers.sample import SampleConfig
    from puna.trainers.sample import run as sample
    from puna.trainers.score import ScoreConfig
    from puna.trainers.score import run as score
    from puna.trainers.sft import SFTConfig
    from puna.trainers.sft import run as sft
    from puna.trainers.train.next_token import next_token_loss

    __version__: str

__all__ = [
    "Answer", "DistillConfig", "EvaluateChatConfig", "EvaluateConfig", "GAttConfig", "Llama",
    "Memory", "Message", "PPOConfig", "PretrainConfig", "RLHFConfig", "RejectionConfig",
    "RewardConfig", "SFTConfig", "SampleConfig", "ScoreConfig", "Tokenizer", "__version__",
    "convert", "distill", "evaluate", "evaluate_chat", "gatt", "load", "next_token_loss", "ppo",
    "pretrain", "rejection", "reward", "rlhf", "sample", "score", "sft", "train_tokenizer",
]  # fmt: skip

STAGES = {
    "pretrain": "PretrainConfig",
    "sft": "SFTConfig",
    "reward": "RewardConfig",
    "rejection": "RejectionConfig",
    "ppo": "PPOConfig",
    "gatt": "GAttConfig",
    "distill": "DistillConfig",
    "rlhf": "RLHFConfig",
    "evaluate": "EvaluateConfig",
    "sample": "SampleConfig",
    "score": "ScoreConfig",
}

PLACES = {  # name -> module, and what it is called there
    **{stage: (f"puna.trainers.{stage}", "run") for stage in STAGES},
    **{config: (f"puna.trainers.{stage}", config) for stage, config in STAGES.items()},
    "Message": ("puna.core.text.chat", "Message"),
    "convert": ("puna.core.checkpoint.convert", "convert"),
    "Memory": ("puna.core.generation.memory", "Memory"),
    "Llama": ("puna.core.llama", "Llama"),
    "load": ("puna.core.llama", "load"),
    "Tokenizer": ("puna.core.text.tokenizer", "Tokenizer"),
    "train_tokenizer": ("puna.core.text.tokenizer", "train_tokenizer"),
    "Answer": ("puna.trainers.rl.rewards", "Answer"),
    "evaluate_chat": ("puna.trainers.evaluation.chat", "run"),
    "EvaluateChatConfig": ("puna.trainers.evaluation.config", "EvaluateChatConfig"),
    "next_token_loss": ("puna.trainers.train.next_token", "next_token_loss"),
}


def _found(name: str) -> Any:
    """What `puna.<name>` stands for, imported now and kept. Raises AttributeError for others."""
    if name == "__version__":
        found: Any = _version()
    elif name in PLACES:
        module, attribute = PLACES[name]
        found = getattr(import_module(module), attribute)
    else:
        raise AttributeError(f"module 'puna' has no attribute {name!r}")
    globals()[name] = found
    return found


if not TYPE_CHECKING:  # to a type checker it would say that every name is there
    __getattr__ = _found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """As installed; a checkout that is only on the path has none."""
    try:
        return version("puna")
    except PackageNotFoundError:
        return "0+checkout"
