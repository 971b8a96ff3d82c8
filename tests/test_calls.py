"""Every operation as it may be called: by name and under autocast, with settings, dtypes, shapes
and devices that do not fit, with nothing in it.

Run: python -m pytest tests/test_calls.py -q
"""

import inspect
import math
import os

import pytest
import torch

from puna import kernels

T, H, K, D, C, V = 5, 4, 2, 8, 8, 11


def floats(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEADS = {"q": floats(2, T, H, D), "k": floats(2, T, K, D), "v": floats(2, T, K, D, seed=1)}
TABLES = dict(zip(("cos", "sin"), kernels.rope_tables(9, D), strict=True))
LABELS = torch.arange(6) * 5 % V
HEAD = {"hidden": floats(6, C), "weight": floats(V, C, seed=1), "targets": LABELS}
NORM = {"x": floats(3, C), "weight": floats(C, seed=1)}
# Operation -> its arguments by name, in the order of its signature, and then its settings.
CALLS = {
    "rms_norm": NORM | {"eps": 1e-3},
    "add_rms_norm": {"x": NORM["x"], "residual": floats(3, C, seed=2)}
    | {"weight": NORM["weight"], "eps": 1e-3},
    "rope": {"q": HEADS["q"], "k": HEADS["k"], **TABLES}
    | {"positions": torch.arange(10).view(2, 5) % 9},
    "swiglu": {"gate": floats(3, C), "up": floats(3, C, seed=1)},
    "attention": HEADS | {"cu_seqlens": torch.tensor([0, 2, 5, 10]), "scale": 0.3},
    "decode_attention": {"q": floats(2, 1, H, D), "k_cache": HEADS["k"], "v_cache": HEADS["v"]}
    | {"lengths": torch.tensor([3, 5]), "scale": 0.3},
    "linear_cross_entropy": HEAD | {"weights": floats(6).abs(), "z_loss": 0.1},
    "linear_logprobs": HEAD | {"temperature": 0.7},
    "sample": {"logits": floats(3, V), "temperature": 0.7, "top_k": 4, "top_p": 0.9}
    | {"seeds": torch.tensor([3, 5, 9])},
    "gae": {"rewards": floats(3, T), "values": floats(3, T, seed=1)}
    | {"lengths": torch.tensor([2, 5, 0]), "gamma": 0.9, "lam": 0.8},
}  # fmt: skip
FLOATING = [
    (name, argument)
    for name, call in CALLS.items()
    for argument, x in call.items()
    # Weights of tokens may be counts, and angles are made by rope_tables.
    if isinstance(x, torch.Tensor) and x.is_floating_point() and argument != "weights"
]
TENSORS = [
    (name, argument)
    for name, call in CALLS.items()
    for argument, x in call.items()
    if isinstance(x, torch.Tensor)
]
SETTINGS = [
    (name, argument)
    for name, call in CALLS.items()
    for argument, x in call.items()
    if isinstance(x, float | int)
]


def several(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.fixture(params=["reference", "triton"])
def back_end(request):
    if request.param == "triton" and not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("TRITON_INTERPRET=1 is not set")
    with kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(back_end):
    return "cuda" if back_end == "triton" and torch.cuda.is_available() else "cpu"


def on(device, call):
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in call.items()}


def test_every_operation_and_every_argument_is_asked():
    functions = {n: f for n, f in vars(kernels).items() if inspect.isfunction(f)}
    assert functions.keys() - {"rope_tables"} == CALLS.keys()
    for name, call in CALLS.items():
        known = inspect.signature(functions[name]).parameters
        words = {"cast", "interleaved", "ignore_index", "reduction"}
        assert list(call) == [each for each in known if each not in words]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_by_name_as_by_place(name, autocast, back_end, device):
    """Also where some operands are named and others are not."""
    function, call = getattr(kernels, name), on(device, CALLS[name])
    places = [
        argument
        for argument, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    found = []
    for number in range(len(places) + 1):
        rest = {each: x for each, x in call.items() if each not in places[:number]}
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            found.append(several(function(*(call[each] for each in places[:number]), **rest)))
    for other in found:
        for mine, truth in zip(other, found[-1], strict=True):
            assert mine.dtype == truth.dtype and torch.equal(mine, truth)
    if autocast and "attention" in name:
        assert found[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_a_tensor_elsewhere_is_one_sentence(name, argument, back_end, device):
    """On meta, say: nothing is computed from what is not there."""
    call = on(device, CALLS[name])
    call[argument] = call[argument].to("meta")
    with pytest.raises(ValueError, match=r"\bon meta\b|not the same device|expected .* on"):
        getattr(kernels, name)(**call)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize(("name", "argument"), FLOATING)
def test_other_numbers_than_floats_are_refused(name, argument, dtype, back_end, device):
    """One operand of them, and all."""
    call = on(device, CALLS[name])
    everything = {a: x.to(dtype) if (name, a) in FLOATING else x for a, x in call.items()}
    with pytest.raises(ValueError, match="float|not the same dtype|not equal"):
        getattr(kernels, name)(**call | {argument: call[argument].to(dtype)})
    with pytest.raises(
        ValueError, match="use float32, float64, bfloat16 or float16|expected float"
    ):
        getattr(kernels, name)(**everything)


@pytest.mark.parametrize(("name", "argument"), SETTINGS)
def test_a_setting_is_a_number_in_its_range(name, argument, back_end, device):
    wrong = [math.nan, math.inf, torch.tensor(0.5)]
    wrong += {
        "eps": [-1e-5],
        "temperature": [-1.0, 1e-39],
        "top_k": [-1, 2.5],
        "top_p": [0.0, 1.1],
        "gamma": [-0.1, 1.2],
        "lam": [-0.1, 1.2],
    }.get(argument, [])
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{argument} is .*; it must be"):
            getattr(kernels, name)(**on(device, CALLS[name]) | {argument: value})


def test_the_largest_top_k_is_none(back_end, device):
    call = on(device, CALLS["sample"])
    for mine, truth in zip(
        kernels.sample(**call | {"top_k": 2**70}),
        kernels.sample(**call | {"top_k": 0}),
        strict=True,
    ):
        assert torch.equal(mine, truth)


def test_tables_of_angles_have_settings_too():
    for wrong, words in (
        ({"positions": -1}, "positions is -1"),
        ({"head_dim": -2}, "head size is -2"),
        ({"theta": 0.0}, "theta is 0.0"),
        ({"theta": -5.0}, "theta is -5.0"),
        ({"theta": math.nan}, "theta is nan"),
        *(({"divisors": torch.ones(s)}, "divisors are") for s in ((3,), (1,), (2, 4), ())),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.rope_tables(**{"positions": 4, "head_dim": 8} | wrong)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_logprobs"])
def test_a_head_is_a_matrix(name, back_end, device):
    """Triton read past the end of what was not one."""
    call = {n: x.to(device) for n, x in HEAD.items()}
    hidden, weight = call["hidden"], call["weight"]
    for wrong in (
        {"weight": weight[0]},
        {"weight": weight[None]},
        {"weight": weight[0, 0]},
        {"hidden": hidden[0, 0], "targets": call["targets"][0]},
        {"hidden": hidden[:, :0], "weight": weight[:, :0]},
    ):
        with pytest.raises(ValueError, match=r"do not fit \(..., C\), \(V, C\), \(...\), C at"):
            getattr(kernels, name)(**call | wrong)


def test_shapes_of_attention_and_rope_that_do_not_fit(back_end, device):
    heads, single = on(device, HEADS), on(device, CALLS["decode_attention"])
    caches = {"k_cache": single["k_cache"], "v_cache": single["v_cache"]}
    with pytest.raises(ValueError, match=r"caches \(B, T, K, D\)"):
        kernels.decode_attention(**single | {n: x[:, :, 0] for n, x in caches.items()})
    for function, call in ((kernels.attention, heads), (kernels.decode_attention, single)):
        empty = {n: x[..., :0] if n[0] in "qkv" else x for n, x in call.items()}
        with pytest.raises(ValueError, match="the head size is 0"):
            function(**empty)
    turned = on(device, CALLS["rope"]) | {"positions": None}
    for change in (lambda x: x[0], lambda x: x[None, None]):
        with pytest.raises(ValueError, match=r"expected \(P, D/2\) or \(B, T, D/2\)"):
            kernels.rope(**turned | {n: change(turned[n]) for n in ("cos", "sin")})


def test_no_query_heads_give_no_gradient(back_end, device):
    """Triton left what nobody had written."""
    k, v = (HEADS[n].to(device).requires_grad_() for n in "kv")
    q = torch.empty(2, T, 0, D, device=device)
    with pytest.MonkeyPatch.context() as patch:
        real = torch.Tensor.new_empty
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **o: real(*a, **o).fill_(7.0))
        found = torch.autograd.grad(kernels.attention(q, k, v).sum(), (k, v))
    assert all(x.count_nonzero() == 0 for x in found)


@pytest.mark.parametrize("name", ["attention", "decode_attention"])
def test_an_empty_batch_has_gradients(name):
    call = {n: x[:0].requires_grad_() for n, x in CALLS[name].items() if n[0] in "qkv"}
    rest = {"lengths": torch.empty(0, dtype=torch.int64)} if name == "decode_attention" else {}
    out = getattr(kernels, name)(**call, **rest)
    found = torch.autograd.grad(out.sum(), list(call.values()))
    assert [x.shape for x in found] == [x.shape for x in call.values()]


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-46, -1e-46])
def test_scales_that_kernels_do_not_take_as_they_are(scale, back_end, device):
    """Below 0, and so small that in fp32 they are 0."""
    q, k, v = (x.to(device) for x in HEADS.values())
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)).double() * scale
    seen = torch.ones(T, T, device=device, dtype=torch.bool).tril()
    shares = scores.masked_fill(~seen, -math.inf).softmax(-1)
    exact = torch.einsum("bhts,bshd->bthd", shares, v.repeat_interleave(2, 2).double())
    torch.testing.assert_close(
        kernels.attention(q, k, v, scale=scale).double(), exact, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_lies_past_a_cache_row_has_no_effect_on_gradients(dtype):
    call = CALLS["decode_attention"]

    def gradients(of_keys, of_values):
        q, k, v = (call[n].detach().to(dtype).clone() for n in ("q", "k_cache", "v_cache"))
        for row, length in enumerate(call["lengths"]):
            k[row, length:], v[row, length:] = of_keys, of_values
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = kernels.decode_attention(*leaves, call["lengths"])
        return out, *torch.autograd.grad(out.sum(), leaves)

    largest = torch.finfo(dtype).max
    clean = gradients(0.0, 0.0)
    for rubbish in (math.nan, math.inf, -math.inf, largest, -largest):
        for both in ((rubbish, 0.0), (0.0, rubbish), (rubbish, rubbish)):
            assert all(torch.equal(a, b) for a, b in zip(gradients(*both), clean, strict=True))
