"""Run: python -m pytest tests/test_linear_logprobs_triton.py -q"""

import importlib
import math

import pytest
import torch
from far_memory import spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from puna.kernels import linear_logprobs, sample, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_empty")
summed = importlib.import_module("puna.kernels.linear_loss.cross_entropy_sum")
core = importlib.import_module("puna.kernels.linear_loss.softmax")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def peer(hidden, weight, targets, temperature=1.0):
    """PyTorch's own operations in the dtype given; exact where that is fp64."""
    logp = (linear(hidden, weight) / temperature).log_softmax(-1)
    return logp.gather(-1, targets[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def run(function, hidden, weight, upstream):
    """(logprobs, entropy, dhidden, dweight)"""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    outs = function(*leaves)
    grads = torch.autograd.grad(outs, leaves, [u.to(outs[0].dtype) for u in upstream])
    return (*(out.detach() for out in outs), *grads)


def make(device, rows, width, vocabulary, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (rows,))
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slice_bytes", [1, 96 << 20])
def test_error_against_pytorch(triton_device, dtype, slice_bytes, no_worse_than_torch, monkeypatch):
    """More than one tile of rows, columns and width, more than one split, one slice or several."""
    monkeypatch.setattr(core, "SLICE_BYTES", slice_bytes)
    hidden, weight, targets = make(triton_device, 140, 72, 1100, dtype)
    hidden /= 4
    upstream = [torch.randn(140).to(triton_device) for _ in range(2)]
    exact = run(lambda *x: peer(*x, targets, 0.7), hidden.double(), weight.double(), upstream)
    theirs = run(lambda *x: peer(*x, targets, 0.7), hidden, weight, upstream)
    ours = run(lambda *x: linear_logprobs(*x, targets, temperature=0.7), hidden, weight, upstream)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, dtype, dtype]
    no_worse_than_torch(ours, theirs, exact)


@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 70),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(triton_device, shape, width, vocabulary, temperature, dtype, seed):
    rows = math.prod(shape)
    hidden, weight, targets = make(triton_device, rows, width, vocabulary, dtype, seed)
    hidden, targets = (hidden * width**-0.5).view(*shape, width), targets.view(shape)
    upstream = [torch.randn(shape).to(triton_device) for _ in range(2)]
    exact = run(
        lambda *x: peer(*x, targets, temperature), hidden.double(), weight.double(), upstream
    )
    ours = run(
        lambda *x: linear_logprobs(*x, targets, temperature=temperature), hidden, weight, upstream
    )
    for mine, truth in zip(ours, exact, strict=True):
        assert mine.shape == truth.shape and mine.isfinite().all()
        if mine.numel():
            most = truth.abs().max().clamp_min(1)
            assert (mine - truth).abs().max() <= 16 * torch.finfo(mine.dtype).eps * most


@settings(max_examples=25)
@given(
    vocabulary=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_logprob_at_most_zero_and_entropy_within_bounds(
    triton_device, vocabulary, scale, dtype, temperature, seed
):
    hidden, weight, targets = make(triton_device, 9, 5, vocabulary, torch.float32, seed)
    hidden = (hidden * scale).clamp(-1e4, 1e4).to(dtype)
    logprobs, entropy = linear_logprobs(hidden, weight.to(dtype), targets, temperature=temperature)
    assert logprobs.isfinite().all() and (logprobs <= 0).all()
    assert (entropy >= 0).all() and (entropy <= math.log(vocabulary) * (1 + 1e-7)).all()


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("rollout", ["triton", "reference"])
@pytest.mark.parametrize("training", ["triton", "reference"])
def test_a_log_prob_at_rollout_equals_the_one_in_training(
    triton_device, temperature, rollout, training
):
    hidden, weight, _ = make(triton_device, 33, 48, 700)
    hidden /= 3
    seeds = torch.arange(33, device=triton_device)
    with use_backend(rollout):
        tokens, drawn = sample(hidden @ weight.T, temperature=temperature, seeds=seeds)
    with use_backend(training):
        trained, _ = linear_logprobs(hidden, weight, tokens, temperature=temperature)
    torch.testing.assert_close(trained, drawn, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_any_batch(triton_device, dtype, products_by_rows):
    hidden, weight, targets = make(triton_device, 300, 40, 1100, dtype)
    whole = linear_logprobs(hidden, weight, targets, temperature=0.9)
    for rows in (slice(0, 1), slice(137, 138), slice(100, 257)):
        part = linear_logprobs(hidden[rows], weight, targets[rows], temperature=0.9)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("upstream", ["expanded", "strided"])
def test_one_output_alone_under_any_upstream_gradient(triton_device, output, upstream):
    hidden, weight, targets = make(triton_device, 12, 5, 9)
    hidden, targets = hidden.view(4, 3, 5), targets.view(4, 3)
    grad = torch.tensor(-1.3).expand(4, 3) if upstream == "expanded" else torch.randn(3, 8).T[::2]
    grad = grad.to(triton_device)
    before = grad.clone()
    which = slice(output, output + 1)
    ours = run(lambda *x: linear_logprobs(*x, targets)[which], hidden, weight, [grad])
    exact = run(lambda *x: peer(*x, targets)[which], hidden.double(), weight.double(), [grad])
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(grad, before)


def test_backward_twice_and_inputs_untouched(triton_device):
    hidden, weight, targets = make(triton_device, 7, 4, 9)
    keep = hidden.clone(), weight.clone(), targets.clone()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    outs = linear_logprobs(*leaves, targets)
    upstream = [torch.randn(7, device=triton_device) for _ in range(2)]
    first = torch.autograd.grad(outs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outs, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*leaves, targets), keep, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_frozen_input(triton_device, frozen, dtype):
    hidden, weight, targets = make(triton_device, 7, 4, 9, dtype)
    ones = [torch.ones(7, device=triton_device)] * 2
    both = run(lambda *x: linear_logprobs(*x, targets), hidden, weight, ones)
    learns = weight if frozen == "hidden" else hidden
    learns.requires_grad_()
    sum(linear_logprobs(hidden, weight, targets)).sum().backward()
    assert torch.equal(learns.grad, both[3 if frozen == "hidden" else 2])


def test_a_frozen_reference_holds_no_logits(triton_device, monkeypatch):
    """Forward only: the largest piece of memory asked for is four numbers a row and split."""
    hidden, weight, targets = make(triton_device, 200, 8, 2000, torch.bfloat16)
    sizes = []
    empty = torch.empty

    def counted(*args, **kwargs):
        made = empty(*args, **kwargs)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", counted)
    with torch.no_grad():
        linear_logprobs(hidden, weight, targets)
    splits = -(-2000 // (core.SPLIT * core.tiles(hidden)["BLOCK_N"]))
    assert sizes == [4 * 200 * splits]


def test_a_label_outside_reads_nothing_and_shows(triton_device, monkeypatch):
    logprobs_module = importlib.import_module("puna.kernels.linear_loss.logprobs")
    monkeypatch.setattr(logprobs_module, "_check_labels", lambda *_: None)
    hidden, weight, targets = make(triton_device, 6, 4, 9)
    upstream = [torch.ones(6, device=triton_device)] * 2
    for wrong in (9, -1, 1 << 40, (1 << 32) + 3):
        targets[2] = wrong
        logprobs, _, d_hidden, _ = run(
            lambda *x: linear_logprobs(*x, targets), hidden, weight, upstream
        )
        assert logprobs.isnan().tolist() == [n == 2 for n in range(6)]
        assert d_hidden.isnan().all(-1).tolist() == [n == 2 for n in range(6)]


def test_bad_input(triton_device, monkeypatch):
    hidden, weight, targets = make(triton_device, 6, 4, 9)
    monkeypatch.setenv("PUNA_DEBUG", "1")
    with pytest.raises(ValueError, match="do not fit"):
        linear_logprobs(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="temperature is 0; it must be a number from 1e-30 to 1e"):
        linear_logprobs(hidden, weight, targets, temperature=0)
    for wrong in (9, -100):
        targets[2] = wrong
        with pytest.raises(ValueError, match="the head has 9 rows"):
            linear_logprobs(hidden, weight, targets)


def test_offsets_past_32_bits(triton_device):
    hidden, other, targets = make(triton_device, 5, 8, 2, torch.bfloat16)
    weight = spread(other.detach()[None, :, None], 2**31)[0, :, 0]  # two rows, 2^31 elements apart
    with torch.no_grad():
        found, truth = (linear_logprobs(hidden, x, targets) for x in (weight, other))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_compiled_in_one_graph(triton_device):
    hidden, weight, targets = make(triton_device, 140, 5, 300, torch.bfloat16)
    upstream = [torch.randn(140, device=triton_device) for _ in range(2)]

    def function(*x):
        return linear_logprobs(*x, targets, temperature=0.8)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, truth in zip(
        run(compiled, hidden, weight, upstream),
        run(function, hidden, weight, upstream),
        strict=True,
    ):
        assert torch.equal(mine, truth)


@pytest.mark.parametrize("gather", [False, True])
def test_operators(triton_device, gather):
    hidden, weight, targets = make(triton_device, 6, 4, 9)
    rows = torch.tensor([1, 2, 5], device=triton_device) if gather else None
    inputs = hidden, weight, targets, rows
    *_, stats = core.linear_softmax_forward(*inputs, 0.8, True)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(core.linear_softmax_forward.operator, (*leaves, targets, rows, 0.8, True))
    a, b, c = torch.randn(3, 6, device=triton_device)
    torch.library.opcheck(
        core.linear_softmax_backward.operator, (*inputs, stats, a, b, c, 0.8, True, True)
    )


class Recorder:
    """Stands for a kernel: counts its launches."""

    launches = 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            assert grid[0] > 0
            Recorder.launches += 1

        return launch


@pytest.mark.parametrize("gather", [False, True])
def test_launchers_run_on_meta_tensors(gather, monkeypatch):
    for where, name in (
        (core, "linear_softmax_forward_kernel"),
        (core, "linear_softmax_join_kernel"),
        (core, "linear_softmax_backward_kernel"),
        (summed, "cross_entropy_kernel"),
    ):
        monkeypatch.setattr(where, name, Recorder())
    monkeypatch.setattr(Recorder, "launches", 0)
    with torch.device("meta"):
        hidden = torch.randn(8192, 4096, dtype=torch.bfloat16)
        weight = torch.randn(32000, 4096, dtype=torch.bfloat16)
        labels, scale = torch.zeros(8192, dtype=torch.int64), torch.zeros(8192)
        rows = torch.zeros(5000, dtype=torch.int64) if gather else None
    inputs = hidden, weight, labels
    *_, stats = core.linear_softmax_forward.__wrapped__(*inputs, rows, 0.8, True)
    assert Recorder.launches == 2
    core.linear_softmax_backward.__wrapped__(
        *inputs, rows, stats, scale, scale, scale, 0.8, True, True
    )
    _, d_hidden, d_weight = summed.linear_cross_entropy_summed.__wrapped__(
        *inputs, scale, rows, 0.0, True, True
    )
    assert d_hidden.shape == hidden.shape and d_weight.shape == weight.shape
    assert Recorder.launches > 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_never_waited_for():
    hidden, weight, targets = make("cuda", 300, 64, 1100, torch.bfloat16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    sum(linear_logprobs(*leaves, targets)).sum().backward()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(linear_logprobs(*leaves, targets)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
