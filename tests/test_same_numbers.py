"""The same numbers in rollout and in training: PPO's ratio is 1 where the weights are the same.

A row's result does not depend on what else is in the batch: bitwise in Triton, to 1e-5 in the
reference, whose matrix products are the CPU's. And a log-prob computed while a token was drawn,
through the cache, is the one computed in training over packed rows.
"""

import os

import pytest
import torch

from puna.core import ops
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.native import engine as native
from puna.kernels import (
    add_rms_norm,
    attention,
    decode_attention,
    linear_cross_entropy,
    linear_logprobs,
    rms_norm,
    rope,
    rope_tables,
    swiglu,
)

ROWS = 5
# Alone, with a few others, in another order: a row must not notice.
SELECTIONS = ([3], [1, 2], [4, 3, 2, 1, 0])

_NO_INTERPRETER = os.environ.get("TRITON_INTERPRET") != "1"
_NO_GPU = not torch.cuda.is_available()


@pytest.fixture(
    params=[
        "reference",
        pytest.param(
            "interpreted", marks=pytest.mark.skipif(_NO_INTERPRETER, reason="no interpreter")
        ),
        pytest.param(
            "gpu",
            marks=[pytest.mark.gpu, pytest.mark.skipif(_NO_GPU, reason="needs a CUDA device")],
        ),
    ]
)
def same(request):
    """Call with a function that takes numbers of rows and returns tensors of those rows."""
    triton = request.param != "reference"
    torch.manual_seed(0)

    def check(function, bitwise=triton):
        together = function(list(range(ROWS)))
        for rows in SELECTIONS:
            for whole, part in zip(together, function(rows), strict=True):
                assert part.isfinite().all()
                if bitwise:
                    assert torch.equal(whole[rows], part), f"rows {rows} differ in other company"
                else:
                    torch.testing.assert_close(whole[rows], part, rtol=1e-5, atol=1e-5)

    check.device = torch.device("cuda" if request.param == "gpu" else "cpu")
    with ops.use_backend("triton" if triton else "reference"):
        yield check


def with_gradients(function, rows, inputs, shared=(), upstream=None):
    """Outputs, and gradients of the selected rows of `inputs`, of `function(*inputs, *shared)`."""
    leaves = [x[rows].clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, *shared)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    upstreams = [upstream[rows].expand_as(out) for out in outputs]  # stride 0, as from a sum
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, upstreams)]


def drawn(*shape, device):
    return torch.randn(shape).to(device)


def uneven(x):
    """One number a row, to weigh its gradient with: (ROWS, 1, ...)."""
    return torch.linspace(0.5, 1.5, ROWS, device=x.device).view(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("width", [40, 300])
def test_norms(same, width):
    x, residual = (drawn(ROWS, width, device=same.device) for _ in range(2))
    weight, upstream = drawn(width, device=same.device), uneven(x)
    same(lambda rows: with_gradients(rms_norm, rows, (x,), (weight,), upstream))
    same(lambda rows: with_gradients(add_rms_norm, rows, (x, residual), (weight,), upstream))


def test_rope(same):
    q, k = (drawn(ROWS, 3, heads, 8, device=same.device) for heads in (4, 2))
    cos, sin = rope_tables(50, 8, device=same.device)
    positions = torch.randint(50, (ROWS, 3), device=same.device)
    upstream = uneven(q)

    def turned(rows):
        def function(q, k):
            return rope(q, k, cos, sin, positions=positions[rows])

        return with_gradients(function, rows, (q, k), (), upstream)

    same(turned)


def test_swiglu(same):
    gate, up = (drawn(ROWS, 90, device=same.device) for _ in range(2))
    same(lambda rows: with_gradients(swiglu, rows, (gate, up), (), uneven(gate)))


@pytest.mark.parametrize("tokens", [5, 70])
def test_attention(same, tokens):
    q, k, v = (drawn(ROWS, tokens, heads, 8, device=same.device) for heads in (2, 1, 1))
    same(lambda rows: with_gradients(attention, rows, (q, k, v), (), uneven(q)))


def test_attention_of_packed_sequences(same):
    """Sequences in one packed row: all of them or some, in any order."""
    lengths = [1, 66, 3, 70, 6]
    parts = [[drawn(1, n, heads, 8, device=same.device) for heads in (4, 2, 2)] for n in lengths]

    def packed(rows):
        q, k, v = (torch.cat([parts[r][i] for r in rows], 1) for i in range(3))
        cuts = torch.tensor([0, *(lengths[r] for r in rows)], device=same.device).cumsum(0)
        out = attention(q, k, v, cu_seqlens=cuts.int())
        each = out[0].split([lengths[r] for r in rows])
        return [torch.stack([x[token] for x in each]) for token in (0, -1)]

    same(packed)


@pytest.mark.parametrize("slots", [6, 300])
def test_decode_attention(same, slots):
    """A row's neighbours have other lengths, and what lies past a length is NaN."""
    q = drawn(ROWS, 1, 4, 8, device=same.device)
    k, v = (drawn(ROWS, slots, 2, 8, device=same.device) for _ in range(2))
    lengths = torch.tensor([1, slots, 3, slots - 1, slots // 2], device=same.device)
    past = torch.arange(slots, device=same.device) >= lengths[:, None]
    k[past] = v[past] = torch.nan
    same(lambda rows: [decode_attention(q[rows], k[rows], v[rows], lengths[rows])])


@pytest.mark.parametrize("vocabulary", [33, 500])
def test_logprobs(same, vocabulary):
    hidden = drawn(ROWS, 24, device=same.device)
    weight = drawn(vocabulary, 24, device=same.device)
    targets = torch.randint(vocabulary, (ROWS,), device=same.device)

    def scored(rows):
        with torch.no_grad():
            return linear_logprobs(hidden[rows], weight, targets[rows], temperature=0.7)

    def losses(rows):
        with torch.no_grad():
            return [linear_cross_entropy(hidden[rows], weight, targets[rows], reduction="none")]

    def gradients(function, **options):
        def found(rows):
            def of_rows(hidden):
                return function(hidden, weight, targets[rows], **options)

            return with_gradients(of_rows, rows, (hidden,), (), uneven(targets))

        return found

    same(scored)
    same(losses)
    # The gradients end in the BLAS's matrix product, on any back end.
    same(gradients(linear_logprobs), bitwise=False)
    same(gradients(linear_cross_entropy, reduction="none"), bitwise=False)


def test_a_draw(same):
    logits = drawn(ROWS, 200, device=same.device)
    seeds = torch.arange(ROWS, device=same.device)
    for settings in ({}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}):
        same(lambda rows, s=settings: ops.sample(logits[rows], seeds=seeds[rows], **s))


# Rollout and training

SHAPE = ModelConfig(32, 2, 4, 2, 48, vocab_size=101, context=48)
PROMPTS = [[1, 5, 9], [1, 7], [3, 4, 5, 6, 8, 2, 11, 90, 14], [2], [100, 1, 5, 9, 30]]
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def policy():
    """Random weights, scaled so that the next token is not a matter of indifference."""
    model = Transformer(SHAPE)
    model.init_weights(seed=3)
    with torch.no_grad():
        model.head_weight.mul_(20)
    return model


def trained_on(model, completions):
    """Log-probs of the answers' tokens as training computes them: all prompts and answers packed
    into one row, hidden states, `linear_logprobs`, with gradients on."""
    rows = [p + c.tokens for p, c in zip(PROMPTS, completions, strict=True)]
    tokens = torch.tensor([[token for row in rows for token in row]])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    cuts = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    hidden = model(tokens, positions, cuts)
    assert hidden.requires_grad
    logprobs, _ = linear_logprobs(
        hidden[:, :-1], model.head_weight, tokens[:, 1:], temperature=TEMPERATURE
    )
    ends = zip(cuts[1:].tolist(), completions, strict=True)
    return [logprobs[0, end - 1 - len(c.tokens) : end - 1].tolist() for end, c in ends]


@pytest.mark.parametrize("batch_size", [2, 256])
@pytest.mark.parametrize("rollout", ["reference", "native"])
def test_logprobs_of_a_rollout_are_those_of_training(policy, rollout, batch_size):
    if rollout == "native" and native.extension() is None:
        pytest.skip("the native engine is not built")
    with ops.use_backend(rollout):
        completions = generate(
            policy, PROMPTS, max_new_tokens=24, eos_id=7, temperature=TEMPERATURE, seed=5,
            batch_size=batch_size,
        )  # fmt: skip
    with ops.use_backend("reference"):
        trained = trained_on(policy, completions)
    assert min(len(c.tokens) for c in completions) > 1
    for completion, again in zip(completions, trained, strict=True):
        assert completion.logprobs == pytest.approx(again, rel=1e-5, abs=1e-5)


@pytest.mark.skipif(_NO_INTERPRETER, reason="TRITON_INTERPRET=1 is not set")
def test_logprobs_of_a_rollout_are_those_of_triton_in_training(policy):
    with ops.use_backend("triton"):
        completions = generate(
            policy, PROMPTS, max_new_tokens=4, eos_id=None, temperature=TEMPERATURE, seed=5
        )
        trained = trained_on(policy, completions)
    with ops.use_backend("reference"):
        reference = trained_on(policy, completions)
    for completion, *others in zip(completions, trained, reference, strict=True):
        for other in others:
            assert completion.logprobs == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(_NO_GPU, reason="needs a CUDA device")
def test_logprobs_of_a_rollout_are_those_of_training_on_a_gpu(policy):
    model = Transformer(SHAPE)
    model.load_state_dict(policy.state_dict())
    model.cuda()
    completions = generate(
        model, PROMPTS, max_new_tokens=24, eos_id=7, temperature=TEMPERATURE, seed=5
    )
    with torch.device("cuda"):
        trained = trained_on(model, completions)
    for completion, again in zip(completions, trained, strict=True):
        assert completion.logprobs == pytest.approx(again, rel=1e-5, abs=1e-5)
