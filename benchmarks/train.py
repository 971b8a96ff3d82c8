"""Training speed: one step of forward, backward, clipping and AdamW, on random tokens.

The steps are the same for every provider, with the same weights, batch and optimizer. Before
anything is timed, three steps of each must give the same losses: then its forward, its
gradients and its update are right. `error` is the largest relative difference of those losses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from puna.benchmarks.models import Ceilings, Models, multiplied_parameters
from puna.benchmarks.rows import Row, Work, rows
from puna.benchmarks.timing import interleaved, peak_mb
from puna.core.config import ModelConfig
from puna.core.ops import linear_cross_entropy

TOKENS = 256
BATCH = {"15m": 8, "demo": 16}
TOLERANCE = 1e-4

Step = Callable[[], float]


def bench_train(models: Models, rounds: int) -> list[Row]:
    """Rows of one shape. RuntimeError where the providers disagree: nothing is timed then."""
    batch = BATCH[models.shape]
    generator = torch.Generator().manual_seed(0)
    shape = (batch, TOKENS)
    tokens = torch.randint(models.config.vocab_size, shape, generator=generator).to(models.device)
    steps = {"puna": puna_step(models, tokens)}
    if models.transformers is not None:
        steps["transformers"] = transformers_step(models, tokens)
    errors = verify(steps)
    peaks = {name: peak_mb(step, models.device) for name, step in steps.items()}
    timings = interleaved(steps, rounds, models.device)
    work = Work("train", models.shape, batch, tokens.numel(), limit(models.config, models.ceilings))
    return rows(work, timings, errors, peaks)


def limit(config: ModelConfig, ceilings: Ceilings) -> float:
    """Tokens a second if all matrix products ran at the best rate and nothing else took time.

    Six FLOPs a parameter and token (forward two, backward four); causal attention's scores and
    values take 2 * T * C each way and layer, halved by the mask.
    """
    attention = 6 * config.n_layers * TOKENS * config.dim
    return ceilings.matmul / (6 * multiplied_parameters(config) + attention)


def verify(steps: dict[str, Step]) -> dict[str, float]:
    """Largest relative difference of each provider's first three losses from Puna's."""
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    errors = {
        name: max(abs(a - b) / abs(b) for a, b in zip(found, losses["puna"], strict=True))
        for name, found in losses.items()
    }
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise RuntimeError(
                f"nothing was timed: {name} trains to other losses than puna "
                f"({losses[name]} against {losses['puna']}); run `make test`"
            )
    return errors


def puna_step(models: Models, tokens: Tensor) -> Step:
    model = models.puna
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]

    def loss() -> Tensor:
        return linear_cross_entropy(model(tokens), model.head_weight, targets)

    return training_step(model, loss)


def transformers_step(models: Models, tokens: Tensor) -> Step:
    model = models.transformers
    assert model is not None
    model.train()
    return training_step(model, lambda: model(tokens, labels=tokens, use_cache=False).loss)


def training_step(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Step:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
    )

    def step() -> float:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step
