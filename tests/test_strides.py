"""Indices and weights with a stride, or one of them for all: as contiguous ones, on every back end.

Labels, positions, cuts, lengths and seeds come as columns of a wider table (`tokens[:, -1]`) or as
`expand`ed constants. Beside them stands here what is no index: whoever reads it is found out.

Run: python -m pytest tests/test_strides.py -q
"""

import inspect
import os

import pytest
import torch

from puna import kernels
from puna.core import ops
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.native.loader import extension

B, T, H, K, D, C, V = 2, 9, 4, 2, 16, 24, 23
FLOATS = {
    "gate", "hidden", "k", "k_cache", "logits", "q", "residual", "rewards", "up", "v", "v_cache",
    "values", "weight", "x", "cos", "sin", "divisors",
}  # fmt: skip


def floats(*shape, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def heads():
    return floats(B, T, H, D), floats(B, T, K, D, seed=1), floats(B, T, K, D, seed=2)


LABELS = (torch.arange(B * T) * 5 % V).view(B, T)
WEIGHTS = torch.arange(B * T).view(B, T) % 3 / 2
PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [4, 5, 6, 7, 8, 0, 1, 2, 3]])
UNEVEN, EVEN = torch.tensor([0, 4, 9, 13, 18]), torch.tensor([0, 3, 6, 9, 12, 15, 18])


def loss(on, hidden, weight, labels, **options):
    return (on.linear_cross_entropy(hidden, weight, labels, **options),)


def turned(on, q, k, positions):
    tables = (table.to(q) for table in kernels.rope_tables(T, D))
    return on.rope(q, k, *tables, positions=positions)


def drawn(on, logits, seeds):
    return on.sample(logits.detach() * 3, seeds=seeds, temperature=0.8)


# (operation, argument) -> [(leaves, the index, call(on, leaves, index))]
CASES = {
    ("linear_cross_entropy", "targets"): [
        ((floats(B, T, C), floats(V, C)), LABELS,
         lambda on, x, i, r=r: loss(on, *x, i, reduction=r))
        for r in ("mean", "sum", "none")
    ],
    ("linear_cross_entropy", "weights"): [
        ((floats(B, T, C), floats(V, C)), WEIGHTS,
         lambda on, x, i, r=r: loss(on, *x, LABELS.to(i.device), weights=i, reduction=r))
        for r in ("mean", "sum", "none")
    ],
    ("linear_logprobs", "targets"): [
        ((floats(B, T, C), floats(V, C)), LABELS, lambda on, x, i: on.linear_logprobs(*x, i))
    ],
    ("rope", "positions"): [(heads()[:2], PLACES, lambda on, x, i: turned(on, *x, i))],
    ("attention", "cu_seqlens"): [
        (heads(), cuts.to(dtype), lambda on, x, i: (on.attention(*x, cu_seqlens=i),))
        for cuts in (UNEVEN, EVEN) for dtype in (torch.int32, torch.int64)
    ],
    ("decode_attention", "lengths"): [
        (tuple(x.detach() for x in (floats(B, 1, H, D), *heads()[1:])), torch.tensor([3, 9]),
         lambda on, x, i: (on.decode_attention(*x, i),))
    ],
    ("gae", "lengths"): [
        ((floats(3, T).detach(), floats(3, T, seed=1).detach()), torch.tensor([2, 9, 5]),
         lambda on, x, i: on.gae(*x, i))
    ],
    ("sample", "seeds"): [
        ((floats(5, V).detach(),), torch.tensor([3, -7, 11, 2**40, 5]),
         lambda on, x, i: drawn(on, *x, i))
    ],
}  # fmt: skip


def column(x):
    """As a column of a table whose other column holds no index."""
    return torch.stack((x, torch.full_like(x, 10**6)), -1)[..., 0]


def part_of_a_row(x):
    return torch.cat((torch.full_like(x, 10**6), x, torch.full_like(x, 10**6)), -1)[
        ..., x.shape[-1] : 2 * x.shape[-1]
    ]


def transposed(x):
    return x.t().contiguous().t()


def expanded(x):
    """One for all: nothing may be read behind it."""
    return x.flatten()[-1].clone().expand(x.shape)


WAYS = [column, part_of_a_row, transposed, expanded]


@pytest.fixture(params=["reference", "triton", "native"])
def device(request):
    if request.param == "native" and extension() is None:
        pytest.skip("the native engine is not built")
    if request.param == "triton" and not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET=1 is not set")
    with ops.use_backend(request.param):
        on_gpu = request.param == "triton" and torch.cuda.is_available()
        yield torch.device("cuda" if on_gpu else "cpu")


def results(call, leaves, index, device):
    """What a call gives, and the gradients of its leaves."""
    leaves = [x.detach().to(device).requires_grad_(x.requires_grad) for x in leaves]
    found = call(ops, leaves, index)
    wanted = [x for x in leaves if x.requires_grad]
    if not wanted:
        return list(found)
    total = sum((x * torch.linspace(1, 2, x.numel()).to(x).view(x.shape)).sum() for x in found)
    return [*found, *torch.autograd.grad(total, wanted)]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_a_stride_changes_nothing(device, name, argument, way):
    interpreted = ops.forced() == "triton" and device.type == "cpu"  # slow: no more than needed
    if interpreted and way in (part_of_a_row, transposed):
        pytest.skip("a stride is a stride")
    for leaves, index, call in CASES[name, argument][: 1 if interpreted else None]:
        if argument == "cu_seqlens" and way is expanded:
            continue  # cuts rise
        given = way(index.to(device))
        assert not given.is_contiguous() or way is not column
        expected = results(call, leaves, given.clone(memory_format=torch.contiguous_format), device)
        for mine, theirs in zip(results(call, leaves, given, device), expected, strict=True):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_every_index_of_every_operation_is_asked():
    public = {name: getattr(kernels, name) for name in vars(kernels)}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f)}
    found = {
        (name, argument)
        for name, function in functions.items()
        for argument, parameter in inspect.signature(function).parameters.items()
        if "Tensor" in str(parameter.annotation) and argument not in FLOATS
    }
    assert found == set(CASES)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_so_it_is_for_a_model(device, way, hooked):
    """Tokens, positions, cuts and labels; also where the head is called."""
    if ops.forced() == "triton":
        pytest.skip("the operations were asked")
    model = Transformer(ModelConfig(C, 1, 2, 1, 32, V, context=2 * T))
    model.init_weights(0)
    if hooked:
        model.lm_head.register_forward_hook(lambda *_: None)

    def run(change):
        tokens, cuts = change(LABELS), UNEVEN if way is expanded else change(UNEVEN)
        hidden = model(tokens, positions=change(PLACES), cu_seqlens=cuts)
        last = hidden[:, -1], tokens[:, -1]
        return [
            model.cross_entropy(hidden, tokens, weights=change(WEIGHTS)),
            *model.logprobs(hidden, tokens), *model.logprobs(*last), model.cross_entropy(*last),
        ]  # fmt: skip

    expected = run(lambda x: way(x).clone(memory_format=torch.contiguous_format))
    for mine, theirs in zip(run(way), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_one_label_for_all_reads_nothing_behind_it(device):
    hidden, weight = floats(6, C).to(device), floats(V, C).to(device)
    label = torch.tensor(3, device=device)
    found, _ = ops.linear_logprobs(hidden, weight, label.expand(6))
    exact = (hidden @ weight.T).log_softmax(-1)[:, 3]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    loss = ops.linear_cross_entropy(hidden, weight, label.expand(6), reduction="sum")
    torch.testing.assert_close(loss, -exact.sum(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_mean_over_negative_weights_is_refused(device, hooked):
    """Divided by next to nothing, it was -inf."""
    model = Transformer(ModelConfig(C, 1, 2, 1, 32, V, context=T)).to(device)
    model.init_weights(0)
    if hooked:
        model.lm_head.register_forward_hook(lambda *_: None)
    hidden, labels = floats(B, T, C).to(device), LABELS.to(device)
    weights = -torch.ones(B, T, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="the weights' sum is -18.0: a mean needs one of at"):
            model.cross_entropy(hidden, labels, weights=weights)
    else:
        assert model.cross_entropy(hidden, labels, weights=weights).isnan()
    total = model.cross_entropy(hidden, labels, weights=weights, reduction="sum")
    assert total < 0 and model.cross_entropy(hidden, labels, weights=0 * weights) == 0


@pytest.mark.parametrize("cuts", [UNEVEN, EVEN])
def test_packed_attention_takes_heads_of_any_stride(device, cuts):
    """Equal segments are a view; of elements that are no neighbours it was refused."""
    expected = ops.attention(*(x.to(device) for x in heads()), cu_seqlens=cuts.to(device))
    apart = [torch.stack((x.detach(), -x.detach()), -1).to(device)[..., 0] for x in heads()]
    assert all(x.stride(3) != 1 for x in apart)
    found = ops.attention(*apart, cu_seqlens=cuts.to(device))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
