"""Run: python -m pytest tests/test_native_loss.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna import kernels
from puna.core import ops
from puna.core.native import cross_entropy as native_loss
from puna.core.native.loader import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="the native extension is not built")


def gradients(loss, hidden, weight, targets, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    found = loss(hidden, weight, targets, **options)
    return (found.detach(), *torch.autograd.grad(found * 3, (hidden, weight)))


@settings(max_examples=40)
@given(
    rows=st.integers(0, 13),
    vocabulary=st.integers(1, 90),
    held=st.integers(1, 300),
    reduction=st.sampled_from(["mean", "sum"]),
    z_loss=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_the_reference_in_fp64(rows, vocabulary, held, reduction, z_loss, weighted, seed):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, 7), torch.randn(vocabulary, 7) * 2
    targets = torch.randint(vocabulary, (rows,))
    targets[torch.rand(rows) < 0.3] = -100
    weights = torch.rand(rows) * (torch.rand(rows) < 0.8) if weighted else None
    options = dict(weights=weights, reduction=reduction, z_loss=z_loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_loss, "CHUNK_ELEMENTS", held)  # several chunks, the last one shorter
        found = gradients(ops.linear_cross_entropy, hidden, weight, targets, **options)
    exact = gradients(
        kernels.linear_cross_entropy, hidden.double(), weight.double(), targets, **options
    )
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "base"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("vocabulary", [1, 15, 64, 259])
def test_each_instruction_set(name, threads, vocabulary):
    if name not in extension().instruction_sets():
        pytest.skip(f"this machine has no {name}")
    torch.manual_seed(0)
    logits = torch.randn(6, vocabulary) * torch.tensor([0.0, 1, 10, 30, 80, 1e4])[:, None]
    labels, scale = torch.randint(vocabulary, (6,)), torch.rand(6)
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
    (gradient,) = torch.autograd.grad(exact @ scale.double(), wide)
    losses = torch.empty(6)
    extension().softmax_loss(
        name, 6, vocabulary, logits.data_ptr(), labels.data_ptr(), scale.data_ptr(), 0.0,
        losses.data_ptr(), threads,
    )  # fmt: skip
    torch.testing.assert_close(losses.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_is_kept():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True)
    targets = torch.tensor([1, 2, 8])
    with torch.no_grad():
        loss = ops.linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(hidden @ weight.detach().T, targets)
    )


def test_mistakes_are_explained_as_by_the_kernels():
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match="targets holds 9; expected 0 to 8"):
        ops.linear_cross_entropy(hidden, weight, torch.tensor([1, 9, 2]))
    with pytest.raises(ValueError, match="do not fit"):
        ops.linear_cross_entropy(hidden, weight[:, :3], torch.tensor([1, 0, 2]))
    with pytest.raises(ValueError, match="expected 'mean', 'sum' or 'none'"):
        ops.linear_cross_entropy(hidden, weight, torch.tensor([1, 0, 2]), reduction="max")
    with pytest.raises(ValueError, match="threads must be at least 1"):
        extension().softmax_loss("base", 0, 1, 0, 0, 0, 0.0, 0, 0)
    with pytest.raises(ValueError, match="this machine has no sse9"):
        extension().softmax_loss("sse9", 0, 1, 0, 0, 0, 0.0, 0, 1)
