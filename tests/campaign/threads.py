"""Many threads, one model: every call gives what it gives alone.

    python tests/campaign/threads.py --threads 8 --calls 1000

A call is a function of its number: generation in every format and with every kind of truncation,
streams that are interleaved, left early or generate inside, log-probs, scores, PyTorch's path
beside the native one, and training steps on models of the calls' own. Each is made alone first.
The calls are then shared out among the threads, in another order in each. Exits with 1 where one
differs.
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice

import torch

from puna.core import ops, packed
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate, stream
from puna.core.model import Transformer

SHAPE = ModelConfig(32, 2, 4, 2, 48, vocab_size=61, context=48)
EOS = 2
DISTINCT = 60  # calls that differ; numbers beyond repeat them

Found = list[list[int]] | list[float]


def build(seed: int, head: str = "lm") -> Transformer:
    model = Transformer(SHAPE, head)
    model.init_weights(seed)
    if head == "lm":
        with torch.no_grad():
            model.lm_head.weight.mul_(15)  # far from uniform, and from ties
    return model


class Models:
    """What all threads share."""

    def __init__(self) -> None:
        self.policy, self.other, self.judge = build(0), build(1), build(2, "score")


def call(models: Models, number: int) -> Found:
    """What call `number` gives."""
    rng = random.Random(number % DISTINCT)
    return CALLS[number % len(CALLS)](models, rng)


def prompt(rng: random.Random) -> list[int]:
    return [1, *(rng.randrange(3, 61) for _ in range(rng.randint(0, 20)))]


def settings(rng: random.Random) -> dict:
    truncation = rng.choice([{}, {}, {"top_k": 5}, {"top_p": 0.8}])
    return dict(
        max_new_tokens=rng.randint(1, 20), eos_id=EOS, temperature=rng.choice([0.0, 0.8, 1.0]),
        seed=rng.randrange(99), **truncation,
    )  # fmt: skip


def generated(models: Models, rng: random.Random) -> Found:
    prompts = [prompt(rng) for _ in range(rng.randint(1, 9))] * rng.choice([1, 2])
    form = rng.choice(["fp32", "fp32", "bf16", "int8"])
    model = rng.choice([models.policy, models.other])
    chosen = dict(weight_format=form, batch_size=rng.choice([2, 99]), **settings(rng))
    return [done.tokens for done in generate(model, prompts, **chosen)]


def interleaved(models: Models, rng: random.Random) -> Found:
    """Two streams in turn, the second one left early, and a generation in the midst of both."""
    first = stream(models.policy, prompt(rng), **settings(rng))
    second = stream(models.policy, prompt(rng), **settings(rng))
    inside = prompt(rng), settings(rng)
    texts: list[list[int]] = [[], [], []]
    for number, token in enumerate(first):
        texts[0].append(token)
        texts[1] += islice(second, 1 if number < 5 else 0)
        if number == 3:
            texts[2] = generate(models.policy, [inside[0]], **inside[1])[0].tokens
    return texts


def by_pytorch(models: Models, rng: random.Random) -> Found:
    with ops.use_backend("reference"):
        prompts = [prompt(rng) for _ in range(3)]
        return [done.tokens for done in generate(models.policy, prompts, **settings(rng))]


def scored(models: Models, rng: random.Random) -> Found:
    sequences = [prompt(rng) + prompt(rng) for _ in range(4)]
    logprobs = torch.cat(packed.logprobs(models.policy, sequences))
    return [*logprobs.tolist(), *packed.score(models.judge, sequences).tolist()]


def outlived(models: Models, rng: random.Random) -> Found:
    """A stream goes on with the weights it began with; the next call has the new ones."""
    model, text, chosen = build(rng.randrange(9)), prompt(rng), settings(rng)
    drawn = stream(model, text, **chosen)
    tokens = list(islice(drawn, 2))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    tokens += drawn
    return [tokens, generate(model, [text], **chosen)[0].tokens]


def trained(models: Models, rng: random.Random) -> Found:
    model = build(rng.randrange(9))
    tokens = torch.tensor([(prompt(rng) * 20)[:20] for _ in range(4)])
    losses = []
    for _ in range(2):
        loss = model.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad
                weight.grad = None
    return losses


CALLS: list[Callable[[Models, random.Random], Found]] = [
    generated, interleaved, generated, by_pytorch, scored, outlived, interleaved, trained
]  # fmt: skip


def same(found: Found, expected: Found) -> bool:
    """Ids exactly; what PyTorch sums, to rounding, which depends on where its memory lies."""
    if expected and isinstance(expected[0], float):
        return len(found) == len(expected) and torch.allclose(
            torch.tensor(found), torch.tensor(expected), rtol=0, atol=2e-5
        )
    return found == expected


def run(threads: int, calls: int) -> list[str]:
    """What went wrong when `calls` calls were shared out among `threads` threads."""
    numbers = range(min(calls, DISTINCT * len(CALLS)))
    alone = [call(Models(), number) for number in numbers]
    models, wrong = Models(), []
    begin = threading.Barrier(threads)

    def work(which: int) -> None:
        mine = list(range(which, calls, threads))
        random.Random(which).shuffle(mine)
        torch.set_num_threads(torch.get_num_threads())
        begin.wait()
        for number in mine:
            try:
                found = call(models, number)
            except Exception as error:
                wrong.append(f"call {number}: {type(error).__name__}: {error}")
                continue
            if not same(found, alone[number % len(alone)]):
                name = CALLS[number % len(CALLS)].__name__
                wrong.append(f"call {number} ({name}): {found} for {alone[number % len(alone)]}")

    workers = [threading.Thread(target=work, args=(which,)) for which in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=1000, help="of all threads together")
    parser.add_argument("--openmp", type=int, default=1, help="OpenMP threads inside a call")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.openmp)
    sys.setswitchinterval(1e-5)  # threads change places 500 times as often
    began = time.monotonic()
    wrong = run(chosen.threads, chosen.calls)
    for line in wrong[:20]:
        print(line)
    seconds = time.monotonic() - began
    print(f"{chosen.calls} calls, {chosen.threads} threads: {len(wrong)} wrong, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
