"""Run: python -m pytest tests/test_head.py -q"""

import pytest
import torch
from altered_llama import build, some_tokens

from puna.core import ops


def hooked_head(model):
    model.head_module.register_forward_hook(lambda module, given, out: out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_plain_tree_takes_the_fused_operations(dtype):
    """To the bit: what the operations give on the weights themselves."""
    model, tokens = build().to(dtype), some_tokens()
    hidden, targets = model(tokens), tokens.roll(-1, 1)
    weights = torch.rand(tokens.shape)
    head = model.lm_head.weight
    for options in ({}, {"reduction": "sum", "weights": weights}, {"reduction": "none"}):
        loss = model.cross_entropy(hidden, targets, **options)
        assert torch.equal(loss, ops.linear_cross_entropy(hidden, head, targets, **options))
    found = model.logprobs(hidden, targets, temperature=0.7)
    expected = ops.linear_logprobs(hidden, head, targets, temperature=0.7)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


OPTIONS = [
    {},
    {"reduction": "sum", "z_loss": 0.1},
    {"reduction": "none", "z_loss": 0.1},
    {"ignore_index": 7, "reduction": "mean"},
    {"weights": torch.tensor([[0.5, 0.0, 2.0, 1.0]] * 2), "reduction": "mean"},
    {"weights": torch.zeros(2, 4), "reduction": "mean"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_called_head_loses_as_the_fused_one(options, dtype):
    """Same value, dtype and gradients; rows without a loss may hold anything."""
    torch.manual_seed(0)
    ours, fused = build().to(dtype), build().to(dtype)
    hooked_head(ours)
    targets = torch.tensor([[1, 7, -100, 40], [7, 3, 5, -100]])
    if options.get("ignore_index") == 7:
        targets = targets.clamp(min=0)
    hidden = torch.randn(2, 4, 32, dtype=dtype)
    dropped = targets == options.get("ignore_index", -100)
    dropped |= options.get("weights", torch.ones(2, 4)) == 0
    hidden[dropped] = torch.nan
    results = []
    for model in (ours, fused):
        given = hidden.clone().requires_grad_()
        loss = model.cross_entropy(given, targets, **options)
        loss.sum().backward()
        results.append((loss, given.grad, model.lm_head.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_called_head_gives_the_fused_ones_logprobs(temperature):
    ours, fused = build(), build()
    hooked_head(ours)
    torch.manual_seed(0)
    hidden, targets = torch.randn(11, 32), torch.randint(41, (11,))
    results = []
    for model in (ours, fused):
        given = hidden.clone().requires_grad_()
        logprobs, entropy = model.logprobs(given, targets, temperature=temperature)
        (logprobs.sum() + 0.3 * entropy.square().sum()).backward()
        results.append((logprobs, entropy, given.grad, model.lm_head.weight.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_tokens_forbidden_by_a_hook_leave_an_entropy():
    model = build()
    forbidden = torch.zeros(41).index_fill_(0, torch.tensor([0, 5]), -torch.inf)
    model.lm_head.register_forward_hook(lambda module, given, out: out + forbidden)
    hidden = torch.randn(4, 32, requires_grad=True)
    logprobs, entropy = model.logprobs(hidden, torch.tensor([1, 2, 3, 4]))
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and entropy.isfinite().all()


@pytest.mark.parametrize("called", [False, True])
def test_mistakes_are_explained_with_any_head(called):
    model, hidden, targets = build(), torch.randn(2, 4, 32), torch.zeros(2, 4, dtype=torch.int64)
    if called:
        hooked_head(model)
    for call, message in (
        (lambda: model.cross_entropy(hidden, targets[:, :3]), "do not fit"),
        (lambda: model.cross_entropy(hidden, targets.int()), "expected torch.int64"),
        (lambda: model.cross_entropy(hidden, targets, reduction="avg"), "'mean', 'sum' or 'none'"),
        (lambda: model.cross_entropy(hidden, targets, weights=torch.ones(2)), "weights are"),
        (lambda: model.cross_entropy(hidden, targets + 41), "targets (run from|holds) 41"),
        (lambda: model.logprobs(hidden, targets[:1]), "do not fit"),
        (lambda: model.logprobs(hidden, targets - 1), "targets (run from|holds) -1"),
        (lambda: model.logprobs(hidden, targets, temperature=0.0), "temperature is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_heads_weight_is_not_given_out_where_it_is_not_all():
    model = build()
    assert model.head_weight is model.lm_head.weight
    hooked_head(model)
    with pytest.raises(ValueError, match="it has a hook; use the model's cross_entropy"):
        model.head_weight  # noqa: B018
