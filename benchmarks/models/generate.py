"""Generation speed: greedy answers to random prompts of equal length, none ending early.

Before anything is timed every provider must have written the same tokens as Puna, up to
near-ties: where two tokens' logits differ by less than `NEAR_TIE`, rounding decides, and what
follows cannot be compared. `error` is the share of answers cut short by a near-tie.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from puna.benchmarks.models.shapes import DTYPES, Ceilings, Models, multiplied_parameters
from puna.benchmarks.models.vllm import vllm_answer
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import Clock, Timing, interleaved, peak_mb
from puna.core.config import ModelConfig
from puna.core.errors import UserError
from puna.core.generation.generate import generate
from puna.core.generation.kv_cache import room, rows_within
from puna.core.model import Transformer
from puna.core.terminal import say

PROMPT, NEW = 16, 240  # tokens; together the budget of 256
BATCHES, GPU_BATCHES = (1, 32), (1, 8, 32, 64, 128, 256)
AT_ONCE = 256  # rows, at the most
NEAR_TIE = {"fp32": 1e-3, "bf16": 0.1}

Answer = Callable[[], list[list[int]]]
Variant = tuple[str, str]  # provider, dtype
PUNA: Variant = ("puna", "fp32")  # the others are held against it


def bench_generate(models: Models, batch: int, rounds: int) -> list[Row]:
    """Rows of one shape and batch. RuntimeError where the providers disagree."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(models.config.vocab_size, (batch, PROMPT), generator=generator)
    new = new_tokens(models.config)
    at_once, cache_bytes = side_by_side(models.puna, batch, PROMPT + new)
    if at_once < batch:
        say(f"generate, {models.shape}: of {batch} rows {at_once} at once, as many as fit")
    ours = puna_answer(models, prompts, cache_bytes)
    answers: dict[Variant, Answer] = {("puna", models.dtype): ours}
    if models.transformers is not None:
        answers["transformers", models.dtype] = transformers_answer(models, prompts)
    if models.vllm is not None:
        answers["vllm", models.dtype] = vllm_answer(models.vllm, prompts.tolist(), new)
    errors = verify(models, prompts, {variant: answer() for variant, answer in answers.items()})
    peaks = {variant: peak_mb(answer, models.device) for variant, answer in answers.items()}
    timings = take_turns(answers, rounds, models.device)

    def work(dtype: str) -> Work:
        bytes_each = DTYPES[dtype].itemsize
        bound = limit(
            models.config, models.ceilings, at_once, PROMPT + new / 2, bytes_each, bytes_each
        )
        return Work("generate", str(models.shape), batch, batch * new, bound, dtype)

    return [
        row(work(variant[1]), variant[0], timings[variant], errors[variant], peaks[variant])
        for variant in answers
    ]


def side_by_side(model: Transformer, rows: int, longest: int) -> tuple[int, int]:
    """(how many of so many rows of `longest` tokens Puna continues at once, the bytes it is given
    for their keys and values): a step reads the weights for so many, and its limit is theirs."""
    config, kind = model.config, model.dtype
    cache_bytes = room(config, model.device, kind)
    return min(rows, AT_ONCE, rows_within(cache_bytes, config, kind, longest)), cache_bytes


def new_tokens(config: ModelConfig) -> int:
    """Of an answer; fewer where the context holds no more."""
    return min(NEW, config.context - PROMPT)


def take_turns(
    answers: Mapping[Variant, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Clock | None = None,
) -> dict[Variant, Timing]:
    """`interleaved` over providers and dtypes."""
    timings = interleaved(
        {" ".join(variant): answer for variant, answer in answers.items()}, rounds, device, clock
    )
    return {variant: timings[" ".join(variant)] for variant in answers}


def limit(
    config: ModelConfig,
    ceilings: Ceilings,
    batch: int,
    positions: float,
    stored: float = 4.0,
    kept: float = 4.0,
) -> float:
    """Tokens a second if a step took only its matrix products or only its reading, whichever
    is longer: each step reads all weights once, `stored` bytes each, and every row's keys and
    values so far, `kept` bytes each, those of `positions` tokens in the mean."""
    parameters = multiplied_parameters(config)
    cached = 2 * config.n_layers * config.n_kv_heads * config.head_dim * positions
    reading = (stored * parameters + kept * batch * cached) / ceilings.read
    computing = 2 * batch * parameters / ceilings.matmul
    return batch / max(reading, computing)


def puna_answer(models: Models, prompts: Tensor, cache_bytes: int | None = None) -> Answer:
    rows_of_ids, new = prompts.tolist(), new_tokens(models.config)

    def answer() -> list[list[int]]:
        found = generate(
            models.puna,
            rows_of_ids,
            max_new_tokens=new,
            eos_id=None,
            temperature=0.0,
            batch_size=AT_ONCE,
            cache_bytes=cache_bytes,
        )
        return [completion.tokens for completion in found]

    return answer


def transformers_answer(models: Models, prompts: Tensor) -> Answer:
    model = models.transformers
    assert model is not None
    model.eval()
    tokens = prompts.to(models.device)
    mask, new = torch.ones_like(tokens), new_tokens(models.config)

    def answer() -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(
                tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return found[:, PROMPT:].tolist()

    return answer


def verify(
    models: Models, prompts: Tensor, answers: Mapping[Variant, list[list[int]]]
) -> dict[Variant, float]:
    """Share of each provider's answers that leave Puna's, all at near-ties."""
    errors, right = {}, answers["puna", models.dtype]
    for variant, found in answers.items():
        ties = 0
        for prompt, ours, theirs in zip(prompts.tolist(), right, found, strict=True):
            if ours != theirs:
                check_near_tie(models, prompt, ours, theirs, " ".join(variant))
                ties += 1
        errors[variant] = ties / len(found)
    return errors


@torch.no_grad()
def check_near_tie(
    models: Models, prompt: list[int], ours: list[int], theirs: list[int], name: str
) -> None:
    """RuntimeError unless the first tokens that differ have nearly the same logit."""
    pairs = zip(ours, theirs, strict=True)
    place = next(i for i, (a, b) in enumerate(pairs) if a != b)
    seen = torch.tensor([prompt + ours[:place]], device=models.device)
    logits = models.puna.logits(models.puna(seen)[0, -1])
    gap = abs(float(logits[ours[place]] - logits[theirs[place]]))
    if not gap < NEAR_TIE[models.dtype]:
        raise UserError(
            f"nothing was timed: {name} wrote token {theirs[place]} where puna wrote "
            f"{ours[place]} (place {place}, logits {gap:.2g} apart); run `make test`"
        )
