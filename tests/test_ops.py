"""Run: python -m pytest tests/test_ops.py -q"""

import pytest
import torch

from puna import kernels
from puna.core import ops
from puna.kernels import backend


@pytest.fixture(autouse=True)
def auto():
    with ops.use_backend("auto"):
        yield
        assert ops.forced() == backend.forced() == "auto"


def test_native_is_a_back_end_of_core_alone():
    """Whoever has imported what: the kernels know their own back ends."""
    with ops.use_backend("native"):
        assert ops.forced() == "native" and backend.forced() == "auto"
    for _ in range(2):
        known = "auto', 'flash_attn', 'reference', 'triton'"
        with pytest.raises(ValueError, match=f"back end is 'native', expected one of .'{known}."):
            kernels.use_backend("native")
        assert ops.forced() == "auto"
    with pytest.raises(ValueError, match="back end is 'cuda', expected one of .*'native'"):
        ops.use_backend("cuda")


def test_back_ends_inside_each_other():
    with ops.use_backend("native"):
        with ops.use_backend("reference"):
            assert ops.forced() == backend.forced() == "reference"
        assert ops.forced() == "native"
        with kernels.use_backend("reference"):
            assert ops.forced() == "reference"
        assert ops.forced() == "native"
    with kernels.use_backend("reference"):
        assert ops.forced() == "reference"
        with ops.use_backend("native"):
            assert ops.forced() == "native" and backend.forced() == "auto"
        assert ops.forced() == backend.forced() == "reference"


def test_for_good():
    ops.use_backend("native")
    assert ops.forced() == "native"
    ops.use_backend("reference")
    assert ops.forced() == backend.forced() == "reference"
    ops.use_backend("auto")


def test_reference_is_no_native_code(monkeypatch):
    def refuse(*_):
        raise AssertionError("native code ran")

    monkeypatch.setattr(ops.native_elementwise, "swiglu", refuse)
    x = torch.ones(2, 4)
    with ops.use_backend("reference"):
        torch.testing.assert_close(ops.swiglu(x, x), torch.nn.functional.silu(x))
    if ops.native_elementwise.fits_swiglu(x, x):
        with ops.use_backend("native"), pytest.raises(AssertionError, match="native code ran"):
            ops.swiglu(x, x)
