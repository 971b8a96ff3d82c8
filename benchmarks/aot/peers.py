"""liger-kernel's counterparts of our kernels, compiled beside them.

Its linear cross-entropy reads numbers back from the device on the way, so it cannot be recorded
without one.
"""

import sys
from functools import partial
from typing import Any

from puna.benchmarks.aot.cases import C, Case, D, F, H, Maker


def cases() -> list[Case]:
    try:
        from liger_kernel.ops import fused_add_rms_norm as add
        from liger_kernel.ops import rms_norm, rope, swiglu
    except ImportError as error:
        sys.exit(f"--peer: {error}: install liger-kernel first.")

    block, warps = rms_norm.calculate_settings(C)

    def norm_backward(m: Maker, n: int) -> list[Any]:
        return [m.bf16(n, C), m.bf16(n, C), m.bf16(C), m.fp32(n), 0.0, 0, block, warps, False, None]

    def add_backward(m: Maker, n: int) -> list[Any]:
        d_y, d_sum, summed = (m.bf16(n, C) for _ in range(3))
        return [d_y, d_sum, summed, m.bf16(C), m.fp32(n), 0.0, 0, block, warps, 1, False]

    def turned(m: Maker, n: int, kv: int) -> list[Any]:
        q, k = m.bf16(n // 2048, 2048, H, D), m.bf16(n // 2048, 2048, kv, D)
        return [q.transpose(1, 2), k.transpose(1, 2), m.bf16(1, 2048, D), m.bf16(1, 2048, D)]

    def gated(m: Maker, n: int, count: int) -> list[Any]:
        return [m.bf16(n, F) for _ in range(count)]

    known: list[Any] = [
        ("rms_norm", rms_norm.rms_norm_forward,
         lambda m, n: [m.bf16(n, C), m.bf16(C), 1e-5, 0.0, "llama", None]),
        ("rms_norm backward", rms_norm.rms_norm_backward, norm_backward),
        ("add_rms_norm", add.fused_add_rms_norm_forward,
         lambda m, n: [m.bf16(n, C), m.bf16(n, C), m.bf16(C), 1e-5, 0.0, "llama"]),
        ("add_rms_norm backward", add.fused_add_rms_norm_backward, add_backward),
        ("rope", rope.rope_forward, partial(turned, kv=H)),
        ("rope grouped", rope.rope_forward, partial(turned, kv=8)),
        ("swiglu", swiglu.swiglu_forward, partial(gated, count=2)),
        ("swiglu backward", swiglu.swiglu_backward, partial(gated, count=3)),
    ]  # fmt: skip
    return [Case(f"liger {name}", launch, arguments) for name, launch, arguments in known]
