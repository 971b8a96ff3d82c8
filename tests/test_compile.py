"""torch.compile(fullgraph=True) of the reference path: same values, same gradients, no break.

Run: python -m pytest tests/test_compile.py -q
"""

import pytest
import torch

from puna import kernels


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def cases():
    torch.manual_seed(0)
    x, weight = leaf(2, 8, 16), leaf(16)
    q, k, v = leaf(2, 8, 4, 8), leaf(2, 8, 2, 8), leaf(2, 8, 2, 8)
    tables, positions = kernels.rope_tables(16, 8), torch.arange(8).repeat(2, 1)
    cuts = torch.tensor([0, 3, 8, 16], dtype=torch.int32)
    hidden, head = leaf(6, 16), leaf(11, 16)
    labels = torch.tensor([1, 2, -100, 3, 4, 10])
    cache, lengths = (torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)), torch.tensor([3, 9])
    seeds, ends = torch.arange(6), torch.tensor([3, 5])
    return {
        "rms_norm": (kernels.rms_norm, (x, weight), {}),
        "add_rms_norm": (kernels.add_rms_norm, (x, x, weight), {}),
        "rope": (kernels.rope, (q, k, *tables), {}),
        "rope with positions": (kernels.rope, (q, k, *tables), {"positions": positions}),
        "swiglu": (kernels.swiglu, (x, leaf(2, 8, 16)), {}),
        "attention": (kernels.attention, (q, k, v), {}),
        "packed attention": (kernels.attention, (q, k, v), {"cu_seqlens": cuts}),
        "decode_attention": (kernels.decode_attention, (q[:, :1].detach(), *cache, lengths), {}),
        "linear_cross_entropy": (kernels.linear_cross_entropy, (hidden, head, labels), {}),
        "a loss a token": (
            kernels.linear_cross_entropy,
            (hidden, head, labels),
            {"reduction": "none", "z_loss": 0.1},
        ),
        "linear_logprobs": (kernels.linear_logprobs, (hidden, head, labels.clamp(min=0)), {}),
        "sample": (kernels.sample, (hidden.detach(),), {"seeds": seeds, "top_k": 3, "top_p": 0.9}),
        "gae": (kernels.gae, (torch.randn(2, 5), torch.randn(2, 5), ends), {}),
    }


def results(function, arguments, options):
    """The outputs, and the gradients of a weighted sum of them."""
    found = function(*arguments, **options)
    found = found if isinstance(found, tuple) else (found,)
    leaves = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    total = sum((out * torch.arange(1.0, out.numel() + 1).view(out.shape)).sum() for out in found)
    gradients = torch.autograd.grad(total, leaves) if leaves else ()
    return [*(out.detach() for out in found), *gradients]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", cases())
def test_one_graph(name, dynamic):
    function, arguments, options = cases()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with kernels.use_backend("reference"):
        expected = results(function, arguments, options)
        found = results(compiled, arguments, options)
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=5e-5, atol=5e-5)


def test_one_graph_of_two_norms():
    """Dynamo makes a symbol of eps, where all numbers are to be ones."""
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def twice(x, weight):
        return kernels.rms_norm(kernels.rms_norm(x, weight), weight)

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager", dynamic=True)
    expected, found = (results(each, (x, weight), {}) for each in (twice, compiled))
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attention_packed", "decode_attention", "linear_cross_entropy"])
def test_the_operators_of_what_must_see_its_values(name):
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 2, 8, requires_grad=True), torch.randn(1, 4, 1, 8)
    arguments = {
        "attention_packed": (q, k, k.clone(), torch.tensor([0, 4]), None),
        "decode_attention": (q[:, :1].detach(), k, k.clone(), torch.tensor([3]), None),
        "linear_cross_entropy": (
            torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True),
            torch.tensor([0, 4, 2]), torch.tensor([1.0, 0.0, 2.0]), "sum", 0.0,
        ),
    }[name]  # fmt: skip
    operator = getattr(torch.ops.puna_kernels, f"{name}_reference")
    torch.library.opcheck(operator.default, arguments)


def test_the_operators_of_log_probs():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*s, requires_grad=True) for s in ((3, 4), (5, 4)))
    labels, given = torch.tensor([0, 4, 2]), torch.randn(3)
    forward = torch.ops.puna_kernels.linear_logprobs_reference.default
    torch.library.opcheck(forward, (hidden, weight, labels, 0.7))
    backward = torch.ops.puna_kernels.linear_logprobs_reference_backward.default
    for wants in ((True, True), (False, True), (True, False)):
        leaves = hidden.detach(), weight.detach()
        torch.library.opcheck(backward, (*leaves, labels, given, given, given, 0.7, *wants))


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_logprobs"])
def test_compiled_losses_keep_no_logits(name):
    """AOT autograd looked into the chunks of the log-probs and kept N x V for the backward."""
    hidden, weight, labels = leaf(64, 4), leaf(500, 4), torch.arange(64)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels, name), fullgraph=True, backend="aot_eager")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        found = compiled(hidden, weight, labels)
    assert kept and max(kept) <= 500 * 4
    total = found if torch.is_tensor(found) else sum(found).sum()
    total.backward()
    assert hidden.grad.isfinite().all() and weight.grad.count_nonzero() == 500 * 4


def test_labels_out_of_range_are_found_in_compiled_losses():
    """Their operator sees values; so do those of cuts and lengths."""
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 1, 8)
    torch._dynamo.reset()
    for call, words in (
        (lambda i: kernels.linear_logprobs(leaf(3, 4), leaf(5, 4), i), "targets run from -1 to 9"),
        (lambda i: kernels.linear_cross_entropy(leaf(3, 4), leaf(5, 4), i), "targets run from"),
        (lambda i: kernels.attention(q, k, k, cu_seqlens=i), "cu_seqlens must run from 0 to 4"),
        (lambda i: kernels.decode_attention(q[:, :1], k, k, i[-1:]), "lengths run from 9 to 9"),
    ):
        with pytest.raises(ValueError, match=words):
            torch.compile(call, backend="aot_eager")(torch.tensor([-1, 4, 9]))
