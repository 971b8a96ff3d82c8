"""The choice of back ends, and how operations are registered.

Run: python -m pytest tests/test_backend.py -q
"""

import importlib
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from puna.kernels import add_rms_norm, backend, rms_norm, rope, swiglu, use_backend
from puna.kernels.backend import tl

KERNELS = Path(backend.__file__).parent
norms = importlib.import_module("puna.kernels.rms_norm")
swiglus = importlib.import_module("puna.kernels.swiglu")


@pytest.fixture
def auto():
    with use_backend("auto"):
        yield
        assert backend.forced() == "auto"


def test_use_backend_for_a_block_and_for_good(auto):
    with use_backend("reference"):
        assert backend.forced() == "reference"
        with use_backend("flash_attn"):
            assert backend.forced() == "flash_attn"
        assert backend.forced() == "reference"
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert backend.forced() == "reference"
    assert backend.forced() == "auto"
    use_backend("reference")
    assert backend.forced() == "reference"
    use_backend("auto")


def test_unknown_names_change_nothing(auto):
    with pytest.raises(ValueError, match="back end is 'cuda', expected one of .*'triton'"):
        use_backend("cuda")
    assert backend.forced() == "auto"


def test_auto_takes_triton_on_a_gpu_and_the_reference_elsewhere(auto):
    low, wide = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float64)
    assert backend.choose(low) == "reference"
    with FakeTensorMode():
        gpu = {d: torch.empty(2, device="cuda", dtype=d) for d in (low.dtype, wide.dtype)}
    assert backend.choose(gpu[low.dtype]) == "triton"
    assert backend.choose(gpu[wide.dtype]) == "reference"
    assert backend.choose(gpu[low.dtype], gpu[wide.dtype]) == "reference"
    assert backend.choose(gpu[low.dtype], unless="it is too wide") == "reference"
    with use_backend("reference"):
        assert backend.choose(gpu[low.dtype]) == "reference"
    with use_backend("flash_attn"):  # not for this operation: as usual
        assert backend.choose(gpu[low.dtype]) == "triton"
        assert backend.choose(low) == "reference"


def test_what_is_forced_and_cannot_run_is_an_error(auto):
    with use_backend("triton"):
        with pytest.raises(ValueError, match="is forced, but .*is on meta: move it to a GPU"):
            backend.choose(torch.zeros(2, device="meta"))
        with pytest.raises(ValueError, match="forced, but it is too wide"):
            backend.choose(torch.zeros(2), unless="it is too wide")
        with pytest.raises(ValueError, match="dtype is torch.float64"):
            swiglu(torch.zeros(2).double(), torch.zeros(2).double())


WITHOUT = """
import sys
{before}
import torch
from puna.kernels import rms_norm, swiglu, use_backend
x = torch.ones(2, 4)
assert torch.allclose(rms_norm(x, x[0]), x, atol=1e-4) and swiglu(x, x).shape == x.shape
use_backend("triton")
try:
    swiglu(x, x)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("before", "message"),
    [("sys.modules['triton'] = None", "triton is not installed"), ("", "set TRITON_INTERPRET=1")],
)
def test_without_triton_or_a_gpu_the_reference_remains(before, message):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(before=before)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert message in done.stdout


def test_a_copied_folder_has_names_and_a_choice_of_its_own(auto, tmp_path, monkeypatch):
    """Under another name, two levels deep, beside this one in the same process."""
    package = tmp_path / "their_project"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, package / "gpu_ops", ignore=ignore)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("their_project.gpu_ops")
    assert torch.ops.their_project_gpu_ops.swiglu_forward.default
    assert torch.ops.puna_kernels.swiglu_forward.default
    x = torch.randn(2, 4)
    with theirs.use_backend("triton"):
        assert backend.forced() == "auto" and theirs.backend.forced() == "triton"
        with pytest.raises(ValueError, match="dtype is torch.float64"):
            theirs.swiglu(x.double(), x.double())
        assert swiglu(x.double(), x.double()).dtype == torch.float64


def test_checks_that_wait_for_a_device_are_asked_for(monkeypatch):
    monkeypatch.delenv("PUNA_DEBUG", raising=False)
    gpu = SimpleNamespace(device=torch.device("cuda"))  # a fake tensor has no values to wait for
    assert backend.visible(torch.zeros(2)) and not backend.visible(gpu)
    monkeypatch.setenv("PUNA_DEBUG", "1")
    assert backend.visible(gpu) and not backend.visible(torch.zeros(2, device="meta"))
    with FakeTensorMode():
        assert not backend.visible(torch.zeros(2))
    seen = []
    torch.compile(lambda x: seen.append(backend.visible(x)) or x + 1, backend="eager")(
        torch.zeros(2)
    )
    assert seen == [False]


def test_rows_are_views_wherever_one_exists():
    x = torch.randn(3, 4, 10)
    for view in (x, x[..., 2:7], x[:, 0], x[0, 0], x[0, :1].expand(5, 10), x[:0]):
        rows = backend.as_rows(view)
        assert rows.shape == (view.shape[:-1].numel(), view.shape[-1])
        assert rows.stride(-1) == 1 and torch.equal(rows, view.reshape(rows.shape))
        assert rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    for view in (x[..., ::2], x.transpose(0, 2), x[..., :1].expand(3, 4, 10)):
        rows = backend.as_rows(view)
        assert rows.stride(-1) == 1 and torch.equal(rows, view.reshape(rows.shape))


@backend.jit
def cast_kernel(X, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, backend_cast(tl.load(X + at), OUT.dtype.element_ty))


backend_cast = backend.cast


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's numpy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_rounds_to_the_nearest(triton_device, dtype):
    torch.manual_seed(0)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3.3e38, 0.0])
    rest = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-30, 65519.0])
    x = torch.cat((ties, rest, torch.randn(52) * 1000)).to(triton_device)
    out = torch.empty(64, dtype=dtype, device=triton_device)
    cast_kernel[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_eager_goes_past_the_registration(triton_device, monkeypatch):
    x = torch.randn(2, 4, device=triton_device)

    def refuse(*_):
        raise AssertionError("the registered operator was called")

    monkeypatch.setattr(swiglus.swiglu_forward.operator, "_opoverload", refuse)
    assert swiglu(x, x).shape == (2, 4)
    with pytest.raises(AssertionError, match="registered"), FakeTensorMode() as mode:
        swiglu(mode.from_tensor(x), mode.from_tensor(x))


def test_fake_tensors_get_shapes_and_dtypes_without_a_launch(triton_device):
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(8, device="cuda")
        y, summed = add_rms_norm(x, x.float(), weight, cast="hf")
        assert y.shape == summed.shape == x.shape and y.dtype == torch.float32
        assert y.device.type == "cuda" and swiglu(x, x).dtype == torch.bfloat16
        head, table = x.unsqueeze(2), torch.empty(3, 4, device="cuda")
        q, k = rope(head, head, table, table)
        assert q.shape == k.shape == head.shape and q.dtype == x.dtype


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("policy", "launches"),
    [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)],
)
def test_selective_checkpointing_names_the_operations(triton_device, monkeypatch, policy, launches):
    """Saved, the operation runs once; recomputed, twice. The gradients are the plain ones."""
    kernel = Counted(norms.rms_norm_forward_kernel)
    monkeypatch.setattr(norms, "rms_norm_forward_kernel", kernel)
    x, weight = (torch.randn(s, device=triton_device).requires_grad_() for s in ((3, 8), (8,)))
    seen = set()

    def decide(context, operation, *args, **kwargs):
        seen.add(operation)
        named = operation == torch.ops.puna_kernels.rms_norm_forward.default
        return policy if named else CheckpointPolicy.PREFER_RECOMPUTE

    def block(x, weight):
        return swiglu(rms_norm(x, weight), x).sin().sum()

    expected = torch.autograd.grad(block(x, weight), (x, weight))
    kernel.launches = 0
    loss = checkpoint(
        block, x, weight, use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, decide),
    )  # fmt: skip
    found = torch.autograd.grad(loss, (x, weight))
    names = {"rms_norm_forward", "swiglu_forward"}
    assert {getattr(torch.ops.puna_kernels, name).default for name in names} <= seen
    assert kernel.launches == launches
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_second_derivatives_are_refused(triton_device, name):
    """Not taken for zero, which PyTorch's own decorator does under a constant gradient."""
    x = torch.randn(2, 4, device=triton_device).requires_grad_()
    with use_backend(name):
        (first,) = torch.autograd.grad(rms_norm(x, x[0]).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        first.sum().backward()


class Block(nn.Module):
    """Norm, projection, gate: the norm's weight may have a dtype of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.packed = Norm(), nn.Linear(8, 32, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        gate, up = self.packed(self.norm(x)).chunk(2, -1)
        return x + self.down(swiglu(gate, up))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return rms_norm(x, self.weight)


@pytest.fixture
def one_rank(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
def test_fsdp_with_mixed_precision(one_rank, norm_dtype):
    """FSDP2 with bf16 parameters, norms kept in fp32 or not: as if cast by hand, by either back
    end, and near fp64."""
    torch.manual_seed(0)
    plain = Block()
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    x, upstream = torch.randn(4, 8), torch.randn(4, 8)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    norms_apart = MixedPrecisionPolicy(param_dtype=norm_dtype, cast_forward_inputs=False)

    def sharded(name):
        model = Block()
        model.load_state_dict(weights)
        fully_shard(model.norm, mesh=one_rank, mp_policy=norms_apart)
        fully_shard(model, mesh=one_rank, mp_policy=low)
        with use_backend(name):
            y = model(x)
            y.backward(upstream.to(y.dtype))
        return y, {n: p.grad.full_tensor() for n, p in model.named_parameters()}

    def by_hand(dtype, norm_dtype):
        model = Block().to(dtype)
        model.load_state_dict(weights)
        model.norm.to(norm_dtype)
        with use_backend("reference"):
            y = model(x.to(dtype))
            y.backward(upstream.to(dtype))
        return y, {n: p.grad for n, p in model.named_parameters()}

    exact, exact_grads = by_hand(torch.float64, torch.float64)
    y_cast, grads_cast = by_hand(torch.bfloat16, norm_dtype)
    for name in ("reference", "triton"):
        y, grads = sharded(name)
        assert y.dtype == torch.bfloat16
        for n, truth in exact_grads.items():
            assert grads[n].dtype == torch.float32
            allowed = 2 * (grads_cast[n].double() - truth).abs().max() + 2**-8 * truth.abs().max()
            assert (grads[n].double() - truth).abs().max() <= allowed, (name, n)
        allowed = 2 * (y_cast.double() - exact).abs().max() + 2**-8 * exact.abs().max()
        assert (y.double() - exact).abs().max() <= allowed


def test_price_of_the_registration(capsys, monkeypatch):
    """Printed, not judged: microseconds of one call on the host, the launch itself left out."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **settings: None

    monkeypatch.setattr(swiglus, "swiglu_forward_kernel", Nothing())
    monkeypatch.setattr(swiglus, "choose", lambda *_: "triton")
    x = torch.randn(4, 8, requires_grad=True)

    def microseconds(call):
        times = []
        for _ in range(200):
            start = time.perf_counter()
            for _ in range(10):
                call()
            times.append((time.perf_counter() - start) * 1e5)
        return min(times)

    launch = swiglus.swiglu_forward
    prices = {
        "launcher alone": microseconds(lambda: launch.__wrapped__(x, x)),
        "swiglu, with a gradient": microseconds(lambda: swiglu(x, x)),
        "registered operator, with a gradient": microseconds(lambda: launch.operator(x, x)),
    }
    with capsys.disabled():
        print("".join(f"\n{name}: {price:.1f} us" for name, price in prices.items()))
