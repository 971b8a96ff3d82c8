"""Run: python -m pytest tests/test_same_bits.py -q

Rollout and training give the same bits: fp32, native code.
"""

import pytest
import torch
from ppo_nets import Trainer, models, prepare

from puna.core import packed
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.native.engine import Engine
from puna.core.native.linear import FAST
from puna.core.native.loader import best_instructions
from puna.core.ops import use_backend
from puna.trainers.rl.rollout import answer_logprobs, answer_states, answer_values, collect

pytestmark = pytest.mark.skipif(
    best_instructions() not in FAST, reason="PyTorch multiplies on this machine"
)

# Sums of more than one chain and of parts of one; groups of 1, 2, 3 and 8 heads; odd vocabularies.
SHAPES = [
    ModelConfig(64, 2, 4, 2, 176, vocab_size=97, context=128),
    ModelConfig(288, 2, 6, 6, 768, vocab_size=1031, context=128),
    ModelConfig(24, 2, 3, 1, 530, vocab_size=33, context=128),
    ModelConfig(128, 1, 8, 1, 300, vocab_size=64, context=256),
    ModelConfig(528, 1, 11, 11, 70, vocab_size=130, context=96),
]
EOS = 2
TEMPERATURE = 0.7


def build(config, head="lm"):
    model = Transformer(config, head)
    model.init_weights(seed=1)
    if head == "lm":
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # distributions with something to choose
    return model


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def prompts(config, count):
    """Of 2 to 41 tokens, some of them twice."""
    torch.manual_seed(count)
    lengths = [2 + i * 7 % 40 for i in range(count // 2)]
    made = [torch.randint(config.vocab_size, (n,)).tolist() for n in lengths]
    return made + made[: count - len(made)]


def rolled_out(model, asked, most, slots):
    return collect(
        model, asked, prompt_ids=range(len(asked)), sample_ids=[0] * len(asked),
        max_new_tokens=most, eos_id=EOS, temperature=TEMPERATURE, seed=3, round_index=0,
        batch_size=slots,
    )  # fmt: skip


def trained_on(model, rollout, max_tokens):
    """(S, T) as a step of PPO computes them, with gradients on."""
    found = torch.zeros_like(rollout.logprobs)
    for rows, hidden, targets in answer_states(model, rollout, max_tokens=max_tokens):
        logprobs, _ = model.logprobs(hidden, targets, temperature=TEMPERATURE)
        assert logprobs.requires_grad
        mask = torch.zeros_like(rollout.mask)
        mask[rows] = rollout.mask[rows]
        found[mask] = logprobs.detach()
    return found


def check_rollouts(config, count, most, slots, sizes):
    model = build(config)
    rollout = rolled_out(model, prompts(config, count), most, slots)
    for size in sizes:
        again, _ = answer_logprobs(model, rollout, temperature=TEMPERATURE, max_tokens=size)
        assert torch.equal(again, rollout.logprobs)
    assert torch.equal(trained_on(model, rollout, 700), rollout.logprobs)
    return int(rollout.lengths.sum())


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("slots", [1, 32])
def test_a_rollout_is_scored_again(config, slots, threads):
    """One prompt after the other and 32 side by side in slots that are filled again; then packed,
    one sequence at a time and many, without gradients and with them."""
    assert check_rollouts(config, 34, 16, slots, (1, 500)) > 100


def test_ten_thousand_tokens():
    assert check_rollouts(SHAPES[0], 400, 60, 32, (4096,)) > 10_000


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_logits_of_any_path(config, threads):
    """A sequence at once, in pieces, and token by token beside others; and the trainer's."""
    model = build(config)
    torch.manual_seed(0)
    rows = torch.randint(config.vocab_size, (3, 90))
    with torch.no_grad():
        trained = model.logits(model(rows))
    session = Engine(model).new_session()
    session.reserve(3, 90)

    def fed(numbers, begin, end):
        count = end - begin
        return session.logits(
            rows[numbers, begin:end].flatten(),
            torch.tensor(numbers).repeat_interleave(count),
            torch.arange(begin, end).repeat(len(numbers)),
            torch.arange(count * len(numbers)),
        ).view(len(numbers), count, -1)

    assert torch.equal(fed([0, 1, 2], 0, 90), trained)
    for cut in (1, 33, 64):
        pieces = torch.cat([fed([1], 0, cut), fed([1], cut, 90)], 1)
        assert torch.equal(pieces[0], trained[1])
    steps = torch.cat([fed([2, 0], place, place + 1) for place in range(90)], 1)
    assert torch.equal(steps, trained[[2, 0]])


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_scores_and_values(config, threads):
    """Of a reward model and a critic: alone, beside others, in any micro-batch, under gradients."""
    model = build(config, "score")
    asked = prompts(config, 20)
    together = packed.score(model, asked)
    for size in (1, 77):
        assert torch.equal(packed.score(model, asked, max_tokens=size), together)
    alone = torch.cat([packed.score(model, [each]) for each in asked])
    assert torch.equal(alone, together)
    policy = build(config)
    rollout = rolled_out(policy, asked, 12, 32)
    values = answer_values(model, rollout, max_tokens=4096)
    assert torch.equal(answer_values(model, rollout, max_tokens=1), values)
    for row in (0, 7, 19):
        one = rollout.select([row])
        assert torch.equal(answer_values(model, one, max_tokens=9)[0], values[row])
    learned = [model.logits(hidden)[:, 0] for _, hidden, _ in answer_states(
        model, rollout, max_tokens=300)]  # fmt: skip
    assert learned[0].requires_grad
    assert torch.equal(torch.cat(learned).detach(), values[rollout.mask])


def test_greedy():
    model = build(SHAPES[0])
    done = generate(model, [[1, 5, 7]] * 2, max_new_tokens=9, eos_id=None, temperature=0.0)
    sequence = [1, 5, 7, *done[0].tokens]
    assert packed.logprobs(model, [sequence])[0][2:].tolist() == done[0].logprobs


def test_the_first_ratio_is_one(threads):
    nets = models()
    with use_backend("native"):
        _, experience = prepare(nets)
        metrics = Trainer(nets).update(experience)
    assert metrics["ratio"] == 1.0
    assert metrics["approx_kl"] == 0.0
