"""Random shapes, strides and values through all of native code: as the reference, and in bounds.

    python tests/campaign/shapes.py --seconds 60 --seed 0

To be run under the sanitizers (`make sanitize`); without them it still compares. A case is a
function of its number: one that went wrong is repeated by `--seed` with that number. Exits with 1
where one is wrong; a sanitizer ends the process and names the line.
"""

import argparse
import math
import random
import sys
import time

import torch
from torch import Tensor

from puna.core import ops
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.native.engine import Engine, instruction_sets

Leaves = list[Tensor]


def floats(rng: random.Random, *shape: int) -> Tensor:
    """Normal numbers, a leaf; their memory has gaps, or another order, in half of the cases."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    way = rng.randrange(4)
    if way == 1 and x.dim():
        x = torch.stack((x, x), -1)[..., 1]
    if way == 2 and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.requires_grad_()


def labels(rng: random.Random, count: int, limit: int) -> Tensor:
    made = torch.tensor([rng.randrange(limit) for _ in range(count)], dtype=torch.int64)
    return rng.choice([made, torch.stack((made, made + limit), 1)[:, 0]])


def size(rng: random.Random, most: int = 70) -> int:
    return rng.choice([0, 1, 2, 3, 5, 8, 16, 17, 31, 64, rng.randint(0, most)])


def linears(rng: random.Random) -> Leaves:
    width = rng.randint(1, 90)
    weights = [floats(rng, rng.randint(1, 90), width) for _ in range(rng.randint(1, 3))]
    leaves = [floats(rng, size(rng), width), *weights]
    return [*ops.linears(*leaves), *leaves]


def feed_forward(rng: random.Random) -> Leaves:
    rows, width, hidden = rng.randint(8, 200), rng.randint(1, 70), rng.randint(1, 90)
    x, gate, up = (floats(rng, n, width) for n in (rows, hidden, hidden))
    leaves = [x, gate, up, floats(rng, width, hidden)]
    return [ops.feed_forward(*leaves), *leaves]


def elementwise(rng: random.Random) -> Leaves:
    rows, width = size(rng), rng.randint(1, 300)
    x, y, weight = floats(rng, rows, width), floats(rng, rows, width), floats(rng, width)
    return [ops.rms_norm(x, weight), ops.swiglu(x, y), x, y, weight]


def rope(rng: random.Random) -> Leaves:
    batch, tokens, half = rng.randint(1, 3), rng.randint(1, 30), rng.randint(1, 40)
    q = floats(rng, batch, tokens, rng.randint(1, 5), 2 * half)
    k = floats(rng, batch, tokens, rng.randint(1, 3), 2 * half)
    tables = ops.rope_tables(tokens + rng.randint(0, 5), 2 * half)
    return [*ops.rope(q, k, *tables), q, k]


def attention(rng: random.Random) -> Leaves:
    batch, tokens, kv = rng.randint(1, 3), rng.randint(1, 90), rng.randint(1, 3)
    head, group = rng.choice([4, 8, 16, 20, 24, 48, 64]), rng.randint(1, 3)
    q, k, v = (floats(rng, batch, tokens, n, head) for n in (kv * group, kv, kv))
    cuts = set(range(0, batch * tokens + 1, tokens))
    cuts |= {rng.randrange(batch * tokens + 1) for _ in range(rng.randint(0, 9))}
    packed = torch.tensor(sorted(cuts)) if rng.random() < 0.7 else None
    return [ops.attention(q, k, v, cu_seqlens=packed), q, k, v]


def losses(rng: random.Random) -> Leaves:
    rows, width, vocabulary = size(rng), rng.randint(1, 60), rng.randint(1, 200)
    hidden, head = floats(rng, rows, width), floats(rng, vocabulary, width)
    wanted = labels(rng, rows, vocabulary)
    weights = torch.tensor([rng.choice([0.0, 0.5, 1.0]) for _ in range(rows)])
    how = dict(weights=weights, reduction=rng.choice(["mean", "sum"]), z_loss=rng.choice([0, 1e-3]))
    loss = ops.linear_cross_entropy(hidden, head, wanted, **how)
    found = ops.linear_logprobs(hidden, head, wanted, temperature=rng.choice([0.7, 1.0]))
    return [loss, *found, hidden, head]


OPERATIONS = [linears, feed_forward, elementwise, rope, attention, losses]


def gradients(found: Leaves) -> Leaves:
    """The results among `found`, and the gradients of its leaves."""
    leaves = [x for x in found if x.is_leaf]
    results = [x for x in found if not x.is_leaf]
    total = sum((x * torch.linspace(0.5, 1, x.numel()).view(x.shape)).sum() for x in results)
    return [*results, *torch.autograd.grad(total, leaves, allow_unused=True)]


def operation(number: int) -> str | None:
    """What is wrong with operation case `number`, or None."""
    make = OPERATIONS[number % len(OPERATIONS)]
    found: list[Leaves] = []
    for backend in ("native", "reference"):
        with ops.use_backend(backend):
            found.append(gradients(make(random.Random(number))))
    for mine, theirs in zip(*found, strict=True):
        if mine is None or theirs is None:
            if mine is not theirs:
                return f"{make.__name__}: a gradient is missing"
        elif mine.numel() and (mine - theirs).abs().max() > 1e-4 * (1 + theirs.abs().max()):
            return f"{make.__name__}: {(mine - theirs).abs().max()} off"
    return None


def model_of(rng: random.Random) -> Transformer:
    widths = [head for head in range(4, 129, 4) if instruction_sets(head)]
    kv, group, head = rng.randint(1, 3), rng.randint(1, 3), rng.choice(widths)
    dim, ffn = kv * group * head, rng.randint(1, 90)
    shape = ModelConfig(dim, rng.randint(1, 2), kv * group, kv, ffn, rng.randint(2, 150), 40)
    model = Transformer(shape)
    model.init_weights(rng.randrange(9))
    return model


def generation(number: int) -> str | None:
    """Any model, format, instruction set and batch; in a third of the cases with NaN or inf."""
    rng = random.Random(number)
    model, form = model_of(rng), rng.choice(["fp32", "bf16", "int8"])
    broken = rng.random() < 0.3
    if broken:
        with torch.no_grad():
            weight = rng.choice(list(model.parameters())).view(-1)
            weight[rng.randrange(len(weight))] = rng.choice([math.nan, math.inf, 1e38])
    vocabulary = model.config.vocab_size
    prompts = [
        [rng.randrange(vocabulary) for _ in range(rng.randint(1, 39))]
        for _ in range(rng.randint(1, 30))
    ]
    name = rng.choice(instruction_sets(model.config.head_dim))
    with Engine(model, name, weight_format=form).session(1, 40) as session:
        fed = torch.tensor(prompts[0]), torch.zeros(len(prompts[0]), dtype=torch.int64)
        session.logits(*fed, torch.arange(len(prompts[0])), torch.arange(len(prompts[0])))
    chosen = dict(
        max_new_tokens=rng.randint(0, 40), eos_id=rng.choice([None, 1]), weight_format=form,
        temperature=rng.choice([0.0, 1e-30, 1.0, 1e30]), batch_size=rng.randint(1, 40),
    )  # fmt: skip
    try:
        done = generate(model, prompts, **chosen)
    except ValueError as error:
        return None if broken and "NaN or inf" in str(error) else f"generation: {error}"
    good = all(0 <= token < vocabulary for each in done for token in each.tokens)
    good = good and all(p <= 0 for each in done for p in each.logprobs)
    return None if good else "generation: a token or log-prob that cannot be"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    chosen = parser.parse_args()
    number, wrong = chosen.seed, 0
    end = time.monotonic() + chosen.seconds
    while time.monotonic() < end:
        torch.set_num_threads(1 + number % 3)
        what = generation(number) if number % 4 == 0 else operation(number)
        if what:
            wrong += 1
            print(f"case {number}: {what}", flush=True)
        number += 1
    print(f"{number - chosen.seed} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
