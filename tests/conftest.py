"""What several test files share: the environment, memory full of NaN, the error criterion, tiny
models and files, the folder of real inputs."""

import os
from pathlib import Path

# Before torch is imported: bf16 matmuls crash on processors that name AMX and do not have it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch import Tensor  # noqa: E402

# Without a GPU, Triton's kernels run in its interpreter; it must know before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch.device("meta") remembers, from its first use on, which functions make tensors. Before
# `poisoned_empty` replaces some: 27 GB were allocated for a 7B model "without memory".
with torch.device("meta"):
    torch.empty(0)

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument and a number: what is in them may change with the clock
    (gzip writes it), and two workers that collect different names run nothing."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module")
def poisoned_empty():
    """Memory that nobody wrote is NaN: a kernel that reads it before writing is found out."""

    def poisoned(make):
        @torch.no_grad()
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return filled

    # Dynamo, too, looks once for torch's functions, and would not know the replaced ones.
    torch.compile(lambda x: torch.empty(2).copy_(x), backend="eager")(torch.ones(2))
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
_NO_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set"
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", marks=_NO_INTERPRETER),
        pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU]),
    ],
)
def triton_device(request):
    """Where the Triton back end, forced, runs: interpreted on the CPU, or on a GPU."""
    from puna.kernels import use_backend

    with use_backend("triton"):
        yield torch.device(request.param)


@pytest.fixture
def products_by_rows(monkeypatch):
    """The interpreter multiplies with numpy, whose BLAS (OpenBLAS 0.3.31) rounds a row by where in
    the tile it stands, 7e-6 off in 40 products: here it is given one row at a time."""
    product = np.matmul

    def by_rows(a, b, **options):
        return np.concatenate([product(a[i : i + 1], b, **options) for i in range(len(a))])

    monkeypatch.setattr(np, "matmul", by_rows)


@pytest.fixture(scope="session")
def no_worse_than_torch():
    """Call with (ours, PyTorch's in the same dtype, exact fp64), each a tuple of tensors.

    Our largest error may be twice PyTorch's own, and one unit in the last place of the largest
    value more.
    """

    def check(ours, peers, exact):
        for mine, peer, truth in zip(ours, peers, exact, strict=True):
            assert mine.isfinite().all()
            truth = truth.double()
            peer_error = (peer.double() - truth).abs().max()
            allowed = 2 * peer_error + torch.finfo(mine.dtype).eps * truth.abs().max()
            assert ((mine.double() - truth).abs() - allowed).max() <= 0

    return check


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tokenizer, files of every kind, and models that train in a second: `lm`
    and the reward models `helpfulness` and `safety` are random, `chat` answers and stops."""
    from tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared():
    """The folder of real inputs; skips where it is absent."""
    given = os.environ.get("PUNA_SHARED")
    folder = Path(given) if given else Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real inputs are not at {folder}; set PUNA_SHARED")
    return folder
