"""Run: python -m pytest tests/test_ops.py -q"""

import threading

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
    """Whoever has imported what: the kernels do not offer it, and choose as usual under it."""
    with ops.use_backend("native"):
        assert ops.forced() == "native" and backend.choose(torch.ones(1)) == "reference"
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
            assert ops.forced() == "native" and backend.choose(torch.ones(1)) == "reference"
        assert ops.forced() == backend.forced() == "reference"


def test_for_good():
    ops.use_backend("native")
    assert ops.forced() == "native"
    ops.use_backend("reference")
    assert ops.forced() == backend.forced() == "reference"
    ops.use_backend("auto")


def test_a_thread_gets_what_it_asked_for():
    """Two that hold a back end each, overlapping: neither sees the other's, nothing is left."""
    meet, found = threading.Barrier(2), {}

    def hold(name):
        with ops.use_backend(name):
            meet.wait()
            found[name] = ops.forced()
            meet.wait()
        meet.wait()

    threads = [threading.Thread(target=hold, args=(name,)) for name in ("reference", "native")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == {"reference": "reference", "native": "native"}


def test_a_thread_that_asks_for_nothing_gets_what_the_main_thread_asked_for():
    """As autograd's threads do; and nothing of what another thread asked for."""
    found = []

    def look():
        found.append(ops.forced())

    def ask():
        with ops.use_backend("native"):
            in_thread(look)

    def in_thread(work):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with ops.use_backend("reference"):
        in_thread(look)
        in_thread(ask)
    in_thread(ask)
    assert found == ["reference", "reference", "auto"]


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


def test_one_object_for_several_blocks():
    """The second `with` did nothing, in silence."""
    asked = kernels.use_backend("reference")
    for _ in range(2):
        with asked:
            assert backend.forced() == "reference"
            with kernels.use_backend("triton"), asked:
                assert backend.forced() == "reference"
            assert backend.forced() == "reference"
        assert backend.forced() == "auto"
    kernels.use_backend("triton")
    with asked:
        assert backend.forced() == "reference"
    assert backend.forced() == "triton"
    later = kernels.use_backend("reference")
    kernels.use_backend("auto")
    with later:
        assert backend.forced() == "reference"
    assert backend.forced() == "auto"


def test_blocks_that_do_not_end_in_order():
    """As of generators: what began later goes with what began first."""
    first, second = kernels.use_backend("reference"), kernels.use_backend("triton")
    first.__exit__()
    assert backend.forced() == "auto"
    second.__exit__()
    assert backend.forced() == "auto"


def test_an_object_of_another_thread():
    found, asked = [], kernels.use_backend("reference")

    def work():
        kernels.use_backend("triton")
        with asked:
            found.append(backend.forced())
        found.append(backend.forced())

    thread = threading.Thread(target=work)
    with asked:
        thread.start()
        thread.join()
        assert found == ["reference", "triton"] and backend.forced() == "reference"


def test_a_thread_that_has_ended_leaves_nothing():
    """The next one may have its number."""
    found = []
    for work in (lambda: kernels.use_backend("reference"), lambda: found.append(backend.forced())):
        for _ in range(10):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert found == ["auto"] * 10


def test_compiled_functions_go_by_the_main_thread():
    def chosen(x):
        return x + {"auto": 1, "reference": 2}[backend.forced()]

    compiled, found = torch.compile(chosen, backend="eager"), []

    def work():
        with kernels.use_backend("reference"):
            found.append(compiled(torch.zeros(())).item())

    for expected in (1.0, 2.0, 1.0):
        with kernels.use_backend("reference" if expected == 2 else "auto"):
            assert compiled(torch.zeros(())).item() == expected
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert found.pop() == expected
