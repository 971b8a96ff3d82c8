"""vLLM on the same weights: greedy answers to prompts of ids, all at once, as its users ask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from puna.benchmarks import opponents

SHARE = 0.45  # of a GPU's memory for its weights and caches: the others are on it, too


def open_vllm(folder: Path, device: torch.device, dtype: str, context: int) -> Any | None:
    """An engine over the model in `folder`; None on a CPU, and where it is not installed or cannot
    be opened (then it is said why)."""
    engine = opponents.function("vllm", "LLM") if device.type == "cuda" else None
    if engine is None:
        return None
    return opponents.attempted(
        "vllm",
        lambda: engine(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
            max_model_len=context,
            gpu_memory_utilization=SHARE,
            seed=0,
        ),
    )


def vllm_answer(engine: Any, prompts: list[list[int]], new: int) -> Callable[[], list[list[int]]]:
    """`new` greedy tokens to each prompt."""
    settings: Any = opponents.function("vllm", "SamplingParams")
    greedy = settings(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]

    def answer() -> list[list[int]]:
        found = engine.generate(asked, greedy, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in found]

    return answer
