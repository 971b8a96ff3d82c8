"""Run: python -m pytest tests/test_native_products.py -q

Products of bf16 in an fp32 model: `use_products("bf16")`, and `--dtype bf16` on a CPU.
"""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native_linear import LAYOUTS, check_same_bits, laid_out
from test_same_bits import SHAPES, build, check_rollouts

from puna import kernels
from puna.core import ops
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.native import linear as native_linear
from puna.core.native import products as native_products
from puna.core.ops import multiplies_bf16, products, use_products
from puna.trainers.sft import SFTConfig
from puna.trainers.train.precision import compute_dtype, products_of

needs_bf16 = pytest.mark.skipif(not multiplies_bf16(), reason="no AVX512-BF16 on this machine")


def rounded(x):
    return x.bfloat16().double()


@needs_bf16
@settings(max_examples=60)
@given(
    rows=st.integers(0, 41),
    columns=st.integers(0, 120),
    inner=st.integers(0, 40) | st.integers(500, 530) | st.integers(1020, 1030),
    a=st.sampled_from(LAYOUTS),
    b=st.sampled_from(LAYOUTS),
    add=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_product_is_that_of_rounded_numbers(rows, columns, inner, a, b, add, threads, seed):
    """In fp64: rounding the operands is all that is lost, sums are fp32's."""
    torch.manual_seed(seed)
    a, b = laid_out(rows, inner, a), laid_out(inner, columns, b)
    room = torch.full((rows * columns + 32,), 7.0)
    out = room[16:-16].view(rows, columns)
    out.copy_(torch.randn(rows, columns) if add else torch.full((rows, columns), torch.nan))
    truth = rounded(a) @ rounded(b) + (out.double() if add else 0)
    with pytest.MonkeyPatch.context() as patch, use_products("bf16"):
        patch.setattr(torch, "get_num_threads", lambda: threads)
        native_linear.matmul(a, b, out, add=add)
    near = 1e-5 * max(1, inner) ** 0.5
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=near)
    assert (room[:16] == 7).all() and (room[-16:] == 7).all()


@needs_bf16
@pytest.mark.parametrize("transposed", [False, True])
def test_same_bits_with_any_threads_and_other_rows(transposed, monkeypatch):
    with use_products("bf16"):
        check_same_bits(2100, transposed, monkeypatch)


def gradients(model, tokens):
    loss = model.cross_entropy(model(tokens), tokens.roll(-1, 1))
    logprobs, entropy = model.logprobs(model(tokens), tokens.roll(-1, 1))
    (loss - 0.1 * logprobs.mean() - 0.1 * entropy.mean()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_is_as_near_fp64_as_autocast(threads, monkeypatch):
    """Loss and every gradient, against the error of PyTorch's own mixed precision: in the mean not
    above it, and each gradient to a tenth (attention rounds the same in both)."""
    config = ModelConfig(64, 2, 4, 2, 176, vocab_size=97, context=64)
    model = Transformer(config)
    model.init_weights(0)
    torch.manual_seed(0)
    tokens = torch.randint(97, (4, 64))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with use_products("bf16"):
        loss, ours = gradients(model, tokens)
    with ops.use_backend("reference"):
        with torch.autocast("cpu", torch.bfloat16):
            _, theirs = gradients(model, tokens)
        exact_loss, exact = gradients(model.double(), tokens)
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-4)
    ratios = []
    for name, truth in exact.items():
        assert ours[name].dtype == torch.float32
        error, allowed = (float((g[name] - truth).norm() / truth.norm()) for g in (ours, theirs))
        assert error <= 1.1 * allowed, name
        assert error > 1e-4, "nothing was rounded"
        ratios.append(error / allowed)
    assert sum(ratios) <= len(ratios)


@needs_bf16
@settings(max_examples=40)
@given(
    tokens=st.integers(1, 75),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([16, 32, 48, 80, 128]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_attention_is_that_of_rounded_numbers(tokens, kv_heads, group, size, threads, seed):
    """Of rounded queries, keys and values, in fp64; the probabilities are rounded, too: to 2^-9 of
    themselves in the result, and in the gradients not at all."""
    torch.manual_seed(seed)
    shapes = [(2, tokens, n, size) for n in (kv_heads * group, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    upstream = torch.randn(q.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        with use_products("bf16"):
            out = ops.attention(q, k, v)
        found = torch.autograd.grad(out, (q, k, v), upstream)
    wide = [rounded(x.detach()).requires_grad_() for x in (q, k, v)]
    truth = kernels.attention(*wide)
    exact = torch.autograd.grad(truth, wide, upstream.double())
    largest = float(wide[2].detach().abs().max())
    assert float((out - truth).abs().max()) <= 2**-9 * largest
    assert tokens == 1 or float((out - truth).abs().max()) > 0
    for mine, right in zip(found, exact, strict=True):
        # d_out . out is of the rounded result
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=0.03 * largest)


@needs_bf16
def test_a_backward_multiplies_as_its_forward_did():
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    with use_products("bf16"):
        y = ops.linear(x, w)
    assert products() == "fp32"
    (inside,) = torch.autograd.grad(y.sum(), x)
    truth = rounded(torch.ones(64, 16)) @ rounded(w.detach())
    torch.testing.assert_close(inside.double(), truth, rtol=0, atol=1e-5)


@needs_bf16
@pytest.mark.parametrize("config", [c for c in SHAPES if c.head_dim % 16 == 0], ids=str)
def test_a_rollout_is_scored_again(config):
    """What was drawn in bf16, under bf16: the same bits, as in fp32 (test_same_bits). Heads that
    are no whole vectors of AVX-512 are drawn by AVX2, which rounds the weights alone."""
    with use_products("bf16"):
        assert check_rollouts(config, 34, 16, 32, (1, 500)) > 100


@needs_bf16
def test_another_thread_multiplies_fp32():
    found = []
    with use_products("bf16"):
        other = threading.Thread(target=lambda: found.append(products()))
        other.start()
        other.join()
        assert products() == "bf16"
    assert found == ["fp32"]


def test_what_cannot_be_had(monkeypatch):
    with pytest.raises(ValueError, match="'fp8'; expected one of fp32, bf16"), use_products("fp8"):
        pass
    monkeypatch.setattr(native_products, "best_instructions", lambda: "avx512")
    with pytest.raises(ValueError, match="no products of bf16"), use_products("bf16"):
        pass


def config_of(folder, **options):
    return SFTConfig(model=folder, data=[folder], out=folder / "out", device="cpu", **options)


@pytest.mark.parametrize("able", [False, True])
def test_what_a_stage_does(tmp_path, monkeypatch, able):
    """Where the processor cannot, and where native code is not used, the weights are cast."""
    monkeypatch.setattr(
        native_products, "best_instructions", lambda: "avx512_bf16" if able else "avx512"
    )
    said = products_of(config_of(tmp_path, dtype="bf16"))
    assert said == ("bf16" if able else "fp32")
    assert compute_dtype(config_of(tmp_path, dtype="bf16")) == (None if able else torch.bfloat16)
    assert products_of(config_of(tmp_path)) == "fp32"
    assert compute_dtype(config_of(tmp_path)) is None
    with ops.use_backend("reference"):
        assert compute_dtype(config_of(tmp_path, dtype="bf16")) == torch.bfloat16


@needs_bf16
def test_greedy_tokens_of_the_engine():
    model = build(SHAPES[0])
    options = dict(max_new_tokens=9, eos_id=None, temperature=0.0, weight_format="bf16")
    together = generate(model, [[1, 5, 7]] * 2 + [[3]], **options)
    assert together[0] == generate(model, [[1, 5, 7]], **options)[0]
