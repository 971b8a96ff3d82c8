"""The compiler of every kernel, without a GPU.

Run: python -m pytest tests/test_aot.py -q
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from puna.benchmarks.aot import cases as aot_cases
from puna.benchmarks.aot import compile as aot_compile
from puna.benchmarks.aot import run as aot  # noqa: E402

# Kernels that are not what they must be, each launched once.
WRONG = """
import sys
import torch, triton, triton.language as tl
from puna.benchmarks.aot import run as aot, cases as aot_cases


@triton.jit
def narrow_kernel(X, Y, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + place, tl.load(X + 3 * place))


@triton.jit
def spilling_kernel(X, Y, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(X + place)
    tl.store(Y + place, x / tl.sum(x) + tl.max(x))


@triton.jit
def scalar_kernel(X, Y, SIDE: tl.constexpr):
    place = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    x = tl.load(X + place).to(tl.float32)
    tl.store(Y + place, tl.dot(x, x, input_precision="ieee"))


def case(name, kernel, size, warps):
    def launch(x):
        kernel[(1,)](x, x, size, num_warps=warps)
    return aot_cases.Case(name, launch, lambda m, n: [m.fp32(size, size if warps == 4 else 1)])


aot_cases.BOUND.update(
    narrow_kernel="memory", spilling_kernel="memory", scalar_kernel="products"
)
wrong = [
    case("narrow", narrow_kernel, 1024, 2), case("scalar", scalar_kernel, 16, 4),
    case("spilling", spilling_kernel, 16384, 1),  # with 64 threads to a warp it does not
]
target = sys.argv[1]
sys.exit(aot.run(target, chosen=wrong if target == "sm_90" else wrong[:2]))
"""


def run(*command, interpret=False):
    """Python in a process of its own: this one may interpret kernels, that one compiles them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_compiles_for_gpus_that_are_not_there():
    done = run("-m", "puna.benchmarks.aot", "--targets", "sm_90,gfx942", "--only", "swiglu,gae")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "_kernel" in line]
    assert len(rows) == 6 and all(" 128 " in row for row in rows)
    assert "6 kernels compiled as they should be" in done.stdout
    assert done.stdout.count("1.00") == 6  # each byte is moved once


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_is_wrong_is_found(tmp_path, target):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    done = run(script, target)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"narrow, narrow_kernel, {target}: loads 32 bits a thread" in done.stdout
    assert f"scalar, scalar_kernel, {target}: no bf16 tensor-core" in done.stdout
    if target == "sm_90":
        assert f"spilling, spilling_kernel, {target}: spills " in done.stdout


def test_refuses_to_interpret():
    done = run("-m", "puna.benchmarks.aot", interpret=True)
    assert done.returncode == 1 and done.stderr.startswith("TRITON_INTERPRET=1 is set")
    assert len(done.stderr.splitlines()) == 1
    done = run("-m", "puna.benchmarks.aot.traffic")
    assert done.returncode == 1 and done.stderr.startswith("Set TRITON_INTERPRET=1")
    for flags in (["--targets", "sm_1"], ["--only", "nothing"]):
        assert run("-m", "puna.benchmarks.aot", *flags).returncode == 1


# What a launch is compiled for, of every launcher at one length and then at others.
LENGTHS = """
from puna.benchmarks.aot import compile as aot_compile
from puna.benchmarks.aot.cases import LENGTH, ROWS, Maker, cases
from puna.benchmarks.gpu.first_calls import OTHERS

seen = set()
for case in cases():
    for rows, length in ((ROWS, LENGTH), *OTHERS):
        arguments = case.arguments(Maker("meta", length), rows)
        for launch in aot_compile.record(lambda: case.launcher(*arguments)):
            made_for = aot_compile._specialised(launch, aot_compile.TARGETS["sm_90"])
            key = launch.kernel.__name__, str(made_for), str(launch.options)
            if key not in seen and rows != ROWS:
                print(case.name, launch.kernel.__name__, rows, length)
            seen.add(key)
print(len(seen), "kernels")
"""


def test_other_lengths_compile_nothing():
    done = run("-c", LENGTHS)
    assert done.returncode == 0, done.stderr
    *again, last = done.stdout.splitlines()
    assert not again and int(last.split()[0]) >= 30


def test_every_kernel_has_a_bound():
    assert aot_cases.kernels() == set(aot_cases.BOUND)
    for kernel, target in aot_cases.SPILLS:
        assert target in aot_compile.TARGETS and aot_cases.BOUND[kernel] != "memory"


FINE = {"spilled": 0, "narrowest": 128, "bf16": True}


@pytest.mark.parametrize(
    ("kernel", "facts", "said"),
    [
        ("rms_norm_forward_kernel", {"bf16": False}, None),
        ("rms_norm_forward_kernel", {"spilled": 4}, "spills 4 bytes"),
        ("rms_norm_forward_kernel", {"narrowest": 64}, "loads 64 bits"),
        ("rms_norm_forward_kernel", {"narrowest": 0}, "loads 0 bits"),
        ("attention_forward_kernel", {"narrowest": 32}, None),
        ("attention_forward_kernel", {"bf16": False}, "no bf16"),
        ("attention_backward_q_kernel", {"spilled": 4}, "spills 4 bytes"),
        ("attention_backward_kv_kernel", {"spilled": 8}, None),  # with a reason, up to a limit
        ("attention_backward_kv_kernel", {"spilled": 400}, "spills 400 bytes"),
        ("unheard_of_kernel", {}, "does not say"),
    ],
)
def test_faults(kernel, facts, said):
    row = aot.Row("a case", kernel, "sm_80", SimpleNamespace(**{**FINE, **facts}))
    found = aot.faults(row)
    assert (not found) if said is None else (len(found) == 1 and said in found[0])
    assert not aot.faults(row._replace(ours=False))


@pytest.mark.parametrize(
    ("line", "bits"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 128),
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 16),
        ("ld.global.L1::evict_first.v2.b64 { %rd1, %rd2 }, [ %rd3 ];", 128),
        ("@%p2 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;", 128),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 4;", 32),
        ("global_load_dwordx4 v[2:5], v[0:1], off", 128),
        ("buffer_load_dwordx2 v[2:3], v0, s[0:3], 0 offen", 64),
        ("global_load_ushort v2, v[0:1], off", 16),
        ("buffer_load_dword v2, v0, s[0:3], 0 offen lds", 32),
        ("st.global.v4.b32 [ %rd1 ], { %r1, %r2, %r3, %r4 };", 0),
        ("ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 ];", 0),
    ],
)
def test_width_of_a_load(line, bits):
    assert aot_compile._bits("\t" + line) == bits
