"""Attention's Triton kernels as PyTorch and the compiler see them, and the flash_attn back end.

Run: python -m pytest tests/test_attention_operator.py -q
"""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from attention_peers import cut, drawn, ours, run
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from puna.kernels import attention, use_backend

forward = importlib.import_module("puna.kernels.attention.forward")
backward = importlib.import_module("puna.kernels.attention.backward")


@pytest.mark.parametrize("packed", [False, True])
def test_operators(triton_device, packed):
    q, k, v, d_out = drawn(triton_device, 1, 3, 1, 1, 8)
    cuts = cut([3], triton_device) if packed else None
    inputs = q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), cuts, 0.3
    torch.library.opcheck(forward.attention_forward.operator, inputs)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = forward.attention_forward(q, k, v, cuts, 0.3)
    given = d_out, q, k, v, out, lse, cuts, 0.3
    torch.library.opcheck(backward.attention_backward.operator, given)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled(triton_device, packed):
    tensors = drawn(triton_device, 1, 9, 4, 2, 8)
    cuts = cut([2, 7], triton_device) if packed else None
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(run(compiled, *tensors, cuts), run(ours, *tensors, cuts), strict=True):
        assert torch.equal(mine, plain)


def test_selective_checkpointing_names_it(triton_device):
    tensors = drawn(triton_device, 1, 9, 2, 2, 8)
    seen = []

    def policy(context, operator, *args, **kwargs):
        seen.append(str(operator))
        return CheckpointPolicy.MUST_SAVE

    def kept(*given):
        return checkpoint(
            ours,
            *given,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    assert all(map(torch.equal, run(kept, *tensors), run(ours, *tensors)))
    assert any(name.endswith("attention_forward.default") for name in seen)


def launched(monkeypatch, tensors, cuts):
    """(kernel, grid, arguments) of every launch of a forward and a backward on meta tensors."""
    launches = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **settings: launches.append((self.name, grid, args, settings))

    for module in (forward, backward):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name))
    q, k, v, d_out = tensors
    out, lse = forward.attention_forward.__wrapped__(q, k, v, cuts, 0.3)
    backward.attention_backward.__wrapped__(d_out, q, k, v, out, lse, cuts, 0.3)
    return launches


def test_launches_need_no_values(monkeypatch):
    """On meta tensors there are none. The grid is one-dimensional, as long as it may be."""
    q, k = (torch.empty(64, 4096, n, 128, dtype=torch.bfloat16, device="meta") for n in (32, 8))
    cuts = torch.empty(10_001, dtype=torch.int32, device="meta")
    for cut_at in (None, cuts):
        launches = launched(monkeypatch, (q, k, k, q), cut_at)
        assert len(launches) == 3 and all(len(grid) == 1 for _, grid, _, _ in launches)
        for name, (programs,), _, chosen in launches:
            block = chosen["BLOCK_N" if "_kv_" in name else "BLOCK_M"]
            tiles = 64 * 4096 // block + (0 if cut_at is None else 10_001)
            assert programs == tiles * (8 if "_kv_" in name else 32)
            assert chosen["num_warps"] in (4, 8)


def test_flash_attn_forced_and_impossible():
    q, k, v, _ = drawn("cpu", 2, 4, 4, 2, 8, torch.bfloat16)
    with use_backend("flash_attn"):
        with pytest.raises(ValueError, match="forced, but the tensors are on cpu"):
            attention(q, k, v)
        with FakeTensorMode():
            x = torch.empty(2, 4, 2, 8, device="cuda")
            with pytest.raises(ValueError, match="forced, but their dtype is torch.float32"):
                attention(x, x, x)
            x = torch.empty(2, 4, 2, 512, device="cuda", dtype=torch.bfloat16)
            with pytest.raises(ValueError, match="forced, but the head size is 512"):
                attention(x, x, x)


def test_flash_attn_is_called_with_our_cuts(monkeypatch):
    """Fake tensors on a fake GPU, and a package that writes down what it was given."""
    calls = []

    def rows(q, k, v, softmax_scale, causal):
        calls.append(("rows", softmax_scale, causal))
        return q

    def packed(q, k, v, cuts_q, cuts_k, most_q, most_k, softmax_scale, causal):
        assert q.shape == (8, 4, 16) and k.shape == v.shape == (8, 2, 16)
        assert cuts_q.dtype == cuts_k.dtype == torch.int32 and cuts_q.is_cuda
        calls.append(("packed", most_q, most_k, softmax_scale, causal))
        return q

    package = SimpleNamespace(flash_attn_func=rows, flash_attn_varlen_func=packed)
    with use_backend("flash_attn"), FakeTensorMode():
        q = torch.empty(2, 4, 4, 16, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 4, 2, 16, device="cuda", dtype=torch.bfloat16)
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        with pytest.raises(ValueError, match="the package flash_attn cannot be imported"):
            attention(q, k, k)
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        assert attention(q, k, k).shape == q.shape
        cuts = torch.empty(4, dtype=torch.int64, device="cuda")
        assert attention(q, k, k, cu_seqlens=cuts, scale=0.5).shape == q.shape
        for scale in (-0.5, 0.0):  # which its kernels do not take either
            assert attention(q, k, k, scale=scale).shape == q.shape
    assert calls[:2] == [("rows", None, True), ("packed", 4, 4, 0.5, True)]
    assert calls[2:] == [("rows", 0.5, True), ("rows", 1.0, True)]
