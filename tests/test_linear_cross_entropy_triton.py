"""Run: python -m pytest tests/test_linear_cross_entropy_triton.py -q"""

import importlib

import pytest
import torch
from far_memory import spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from puna.kernels import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_empty")
module = importlib.import_module("puna.kernels.linear_loss.cross_entropy")
summed = importlib.import_module("puna.kernels.linear_loss.cross_entropy_sum")
core = importlib.import_module("puna.kernels.linear_loss.softmax")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def small_pieces(monkeypatch):
    """Chunks of 128 rows and slices of 256 columns, so that there are several of each."""
    monkeypatch.setattr(summed, "CHUNK_BYTES", 1)
    monkeypatch.setattr(core, "SLICE_BYTES", 1)


def peer(hidden, weight, targets, weights=None, reduction="mean", z_loss=0.0):
    """PyTorch's own operations in the dtype given; exact where that is fp64."""
    logits = linear(hidden, weight)
    rows = targets != -100
    norm = logits.logsumexp(-1)
    losses = norm - logits.gather(-1, targets.clamp(0)[..., None]).squeeze(-1)
    scale = rows.to(hidden.dtype) if weights is None else (weights * rows).to(hidden.dtype)
    losses = (losses + z_loss * norm.square()) * scale
    if reduction == "none":
        return losses
    return losses.sum() / (scale.sum().clamp_min(1e-30) if reduction == "mean" else 1)


def run(function, hidden, weight, upstream=None):
    """(loss, dhidden, dweight)"""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(*leaves)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, upstream))


def make(device, rows, width, vocabulary, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (rows,))
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def check(
    triton_device, judge, dtype, shape, reduction, seed=0, weighted=True, z_loss=0.01, scale=1.0
):
    hidden, weight, targets = make(triton_device, *shape, dtype, seed)
    hidden *= scale
    targets[torch.rand(shape[0]) < 0.2] = -100
    weights = torch.rand(shape[0]).to(triton_device) if weighted else None
    upstream = torch.randn(shape[0] if reduction == "none" else ()).to(triton_device)
    options = {"weights": weights, "reduction": reduction, "z_loss": z_loss}
    exact = run(lambda *x: peer(*x, targets, **options), hidden.double(), weight.double(), upstream)
    theirs = run(lambda *x: peer(*x, targets, **options), hidden, weight, upstream)
    ours = run(lambda *x: linear_cross_entropy(*x, targets, **options), hidden, weight, upstream)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    judge(ours, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_error_against_pytorch(triton_device, dtype, reduction, no_worse_than_torch):
    """More than one tile of rows, of columns and of the width, and more than one split."""
    check(triton_device, no_worse_than_torch, dtype, (140, 72, 1100), reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("small_pieces")
def test_error_in_several_chunks_and_slices(triton_device, dtype, reduction, no_worse_than_torch):
    check(triton_device, no_worse_than_torch, dtype, (290, 24, 600), reduction, z_loss=0.0)


@settings(max_examples=12)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(triton_device, rows, width, vocabulary, dtype, reduction, weighted, seed):
    """In a few numbers chance decides whose rounding is the luckier: a plain bound instead."""

    def within(ours, _, exact):
        for mine, truth in zip(ours, exact, strict=True):
            unit = torch.finfo(mine.dtype if reduction == "none" else dtype).eps
            assert (mine - truth).abs().max() <= 8 * unit * truth.abs().max().clamp_min(1)

    shape = rows, width, vocabulary
    check(triton_device, within, dtype, shape, reduction, seed, weighted, scale=width**-0.5)


@pytest.mark.usefixtures("small_pieces")
def test_weight_gradient_of_many_chunks_is_summed_in_fp32(triton_device):
    """4 chunks of 128 rows: a sum in bf16 would lose some of what the later ones add."""
    rows = torch.tensor([16, 1 + 1 / 32, 1 + 1 / 32, 1 + 1 / 32]).repeat_interleave(128)
    hidden = rows[:, None].to(triton_device, torch.bfloat16)
    weight = torch.zeros(8, 1, device=triton_device, dtype=torch.bfloat16)
    targets = torch.zeros(512, dtype=torch.int64, device=triton_device)
    _, _, d_weight = run(
        lambda *x: linear_cross_entropy(*x, targets, reduction="sum"), hidden, weight
    )
    exact = hidden.double().sum() / 8 * torch.tensor([-7.0] + [1.0] * 7).to(triton_device)
    assert torch.equal(d_weight.squeeze(1), exact.bfloat16())
    rounded = torch.zeros((), dtype=torch.bfloat16)
    for part in hidden.cpu().double().view(4, 128).sum(1) / 8:
        rounded = (rounded.double() + part).bfloat16()
    assert rounded != exact[1].bfloat16()  # so the test could fail


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_labels_ignored_and_no_rows_at_all(triton_device, reduction):
    hidden, weight, targets = make(triton_device, 6, 4, 5)
    for rows in (6, 0):
        loss, d_hidden, d_weight = run(
            lambda *x, n=rows: linear_cross_entropy(
                *x, torch.full_like(targets[:n], -100), reduction=reduction
            ),
            hidden[:rows],
            weight,
        )
        assert (loss == 0).all() and (d_hidden == 0).all() and (d_weight == 0).all()
        assert d_hidden.shape == (rows, 4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dropped_rows_may_hold_anything(triton_device, reduction):
    hidden, weight, targets = make(triton_device, 6, 4, 5)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, torch.nan]).to(triton_device)
    targets[4], targets[5], targets[1] = 7, 7, 99
    hidden[1] = hidden[4] = hidden[5] = torch.nan
    keep = torch.tensor([0, 2, 3], device=triton_device)
    whole = run(
        lambda *x: linear_cross_entropy(
            *x, targets, weights=weights, ignore_index=7, reduction=reduction
        ),
        hidden,
        weight,
    )
    few = run(
        lambda h, w: linear_cross_entropy(
            h[keep], w, targets[keep], weights=weights[keep], reduction=reduction
        ),
        hidden.nan_to_num(),
        weight,
    )
    if reduction == "none":
        assert (whole[0][[1, 4, 5]] == 0).all()
        whole = whole[0][keep], *whole[1:]
    for mine, truth in zip(whole, few, strict=True):
        torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_layouts(triton_device, layout, reduction):
    hidden, weight, targets = make(triton_device, 6, 10, 20)
    if layout == "strided":
        views = (
            hidden.view(2, 3, 10)[:, ::2, 1:6],
            weight[::3, 1:6],
            (targets % 7).view(2, 3)[:, ::2],
        )
    elif layout == "transposed":
        views = hidden[:, :6].T, weight[:, :6].T.contiguous().T, targets
        views = views[0].contiguous().T, *views[1:]
    else:
        views = hidden[:1].expand(4, 10), weight[:1].expand(3, 10), targets[:4] % 3
    hidden, weight, targets = views
    ours = run(lambda *x: linear_cross_entropy(*x, targets, reduction=reduction), hidden, weight)
    exact = run(lambda *x: peer(*x, targets, reduction=reduction), hidden.double(), weight.double())
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upstream", ["expanded", "strided", "zero"])
def test_none_under_any_upstream_gradient(triton_device, upstream):
    hidden, weight, targets = make(triton_device, 12, 5, 9)
    grads = {
        "expanded": torch.tensor(-1.3).expand(12),
        "strided": torch.randn(12, 3)[:, 1],
        "zero": torch.zeros(12),
    }[upstream].to(triton_device)
    before = grads.clone()
    ours = run(
        lambda *x: linear_cross_entropy(*x, targets, reduction="none"), hidden, weight, grads
    )
    exact = run(
        lambda *x: peer(*x, targets, reduction="none"), hidden.double(), weight.double(), grads
    )
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(grads, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_and_inputs_untouched(triton_device, reduction):
    hidden, weight, targets = make(triton_device, 7, 4, 9)
    keep = hidden.clone(), weight.clone(), targets.clone()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(*leaves, targets, reduction=reduction)
    upstream = torch.full(loss.shape, 0.3, device=triton_device)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    held = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, leaves, upstream)
    for a, b, c in zip(first, held, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip((*leaves, targets), keep, strict=True))
    assert (upstream == 0.3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_of_a_sum_scales_its_gradients(triton_device, dtype):
    """By 1/3 in fp32: the factor itself must not be rounded to 16 bits."""
    hidden, weight, targets = make(triton_device, 7, 4, 9, dtype)
    third = torch.tensor(1 / 3, device=triton_device)

    def function(*x):
        return linear_cross_entropy(*x, targets, reduction="sum")

    for one, part in zip(
        run(function, hidden, weight)[1:], run(function, hidden, weight, third)[1:], strict=True
    ):
        assert torch.equal(part, (one.float() * third).to(dtype))


def test_fp16_gradients_are_scaled_before_they_are_rounded(triton_device):
    """A sum of 70,000 does not fit fp16; its mean does."""
    hidden = torch.full((700, 1), 100.0, device=triton_device, dtype=torch.float16)
    weight = torch.tensor([[0.0], [1.0]], device=triton_device, dtype=torch.float16)
    targets = torch.zeros(700, dtype=torch.int64, device=triton_device)
    _, _, d_weight = run(lambda *x: linear_cross_entropy(*x, targets), hidden, weight)
    assert d_weight.squeeze(1).tolist() == [-100, 100]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_frozen_input(triton_device, reduction, frozen, dtype):
    hidden, weight, targets = make(triton_device, 7, 4, 9, dtype)
    both = run(
        lambda *x: linear_cross_entropy(*x, targets, reduction=reduction).sum(), hidden, weight
    )
    learns, other = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    learns.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()
    assert torch.equal(learns.grad, both[2 if frozen == "hidden" else 1]) and other.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_any_batch(triton_device, dtype, products_by_rows):
    hidden, weight, targets = make(triton_device, 300, 40, 1100, dtype)
    whole = linear_cross_entropy(hidden, weight, targets, reduction="none")
    for rows in (slice(0, 1), slice(137, 138), slice(100, 257)):
        part = linear_cross_entropy(hidden[rows], weight, targets[rows], reduction="none")
        assert torch.equal(part, whole[rows])
    targets[::2] = -100
    part = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert torch.equal(part[1::2], whole[1::2])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_label_outside_reads_nothing_and_shows(triton_device, reduction, monkeypatch):
    """What a GPU does, which is not asked to wait for the check: NaN, not some number."""
    monkeypatch.setattr(module, "_check_labels", lambda *_: None)
    hidden, weight, targets = make(triton_device, 6, 4, 9, torch.bfloat16)
    for wrong in (9, -1, 1 << 40, (1 << 32) + 3):
        targets[2] = wrong
        loss, d_hidden, _ = run(
            lambda *x: linear_cross_entropy(*x, targets, reduction=reduction), hidden, weight
        )
        assert loss.view(-1)[2 if reduction == "none" else 0].isnan()
        assert d_hidden[2].isnan().all()
        if reduction == "none":
            assert loss.isfinite().sum() == 5


def test_bad_input(triton_device, monkeypatch):
    hidden, weight, targets = make(triton_device, 6, 4, 9)
    monkeypatch.setenv("PUNA_DEBUG", "1")
    for wrong in (9, -1):
        targets[2] = wrong
        with pytest.raises(ValueError, match="the head has 9 rows"):
            linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(ValueError, match="not the same dtype"):
        linear_cross_entropy(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match="targets are torch.float32"):
        linear_cross_entropy(hidden, weight, targets.float())
    with pytest.raises(ValueError, match="weight has no rows"):
        linear_cross_entropy(hidden, weight[:0], targets)
    with pytest.raises(ValueError, match="weight is on meta"):
        linear_cross_entropy(hidden, weight.to("meta"), targets)


def test_offsets_past_32_bits(triton_device):
    hidden, other, targets = make(triton_device, 5, 8, 2, torch.bfloat16)
    weight = spread(other.detach()[None, :, None], 2**31)[0, :, 0]  # two rows, 2^31 elements apart
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert torch.equal(losses, linear_cross_entropy(hidden, other, targets, reduction="none"))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("reduction, dropped", [("mean", False), ("mean", True), ("none", True)])
def test_compiled_in_one_graph(triton_device, reduction, dropped):
    hidden, weight, targets = make(triton_device, 140, 5, 300, torch.bfloat16)
    if dropped:
        targets[3] = -100

    def function(*x):
        return linear_cross_entropy(*x, targets, reduction=reduction, z_loss=0.1)

    torch.compiler.reset()
    upstream = torch.tensor(0.7, device=triton_device)
    upstream = upstream if reduction == "mean" else upstream.expand(140)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, truth in zip(
        run(compiled, hidden, weight, upstream),
        run(function, hidden, weight, upstream),
        strict=True,
    ):
        assert torch.equal(mine, truth)


def test_compiled_once_for_sizes_that_change(triton_device):
    def function(hidden, weight, targets):
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
        return linear_cross_entropy(hidden, weight, targets) + losses.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 9, 12):
        hidden, weight, targets = make(triton_device, rows, 4, 9)
        targets[rows // 2] = -100
        found = run(lambda *x, t=targets: compiled(*x, t), hidden, weight)
        exact = run(lambda *x, t=targets: function(*x, t), hidden, weight)
        for mine, truth in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused(triton_device, reduction):
    hidden, weight, targets = make(triton_device, 6, 4, 9)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        first.square().sum().backward()


@pytest.mark.parametrize("gather", [False, True])
def test_operator(triton_device, gather):
    hidden, weight, targets = make(triton_device, 6, 4, 9)
    rows = torch.tensor([1, 2, 5], device=triton_device) if gather else None
    scale = torch.rand(6, device=triton_device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(
        summed.linear_cross_entropy_summed.operator,
        (*leaves, targets, scale, rows, 0.01, True, True),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_at_llama_7b_shapes(reduction):
    hidden = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 4096, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    weight.requires_grad_()
    targets = torch.randint(32000, (8192,), device="cuda")
    linear_cross_entropy(hidden[:256], weight, targets[:256]).backward()  # cuBLAS's workspace
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients <= 300e6
