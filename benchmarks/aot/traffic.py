"""Bytes that kernels move, counted while Triton's interpreter runs them on the CPU.

python -m puna.benchmarks.aot.traffic   prints {case: moved / least} as JSON, or what went wrong:
triton 3.6's interpreter does not run loops under numpy 2.4.

Moved is what the kernels' loads and stores name, without the lanes that are masked off, and as
if there were no caches: a weight that every program reads counts once a program. Least is every
argument and every result, once.
"""

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from puna.benchmarks.aot.cases import Case, cases


def ratio(case: Case) -> float:
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    moved = 0

    def counting(operation: Any, mask_at: int) -> Any:
        def counted(self: Any, pointers: Any, *args: Any) -> Any:
            nonlocal moved
            bits = pointers.get_element_ty().primitive_bitwidth
            moved += int(args[mask_at].data.sum()) * max(bits // 8, 1)
            return operation(self, pointers, *args)

        return counted

    made = Builder.create_masked_load, Builder.create_masked_store
    Builder.create_masked_load = counting(made[0], 0)
    Builder.create_masked_store = counting(made[1], 1)
    try:
        arguments, results = case.run("cpu", case.counted)
    finally:
        Builder.create_masked_load, Builder.create_masked_store = made
    results = results if isinstance(results, tuple) else (results,)
    tensors = [x for x in (*arguments, *results) if isinstance(x, Tensor)]
    return moved / sum(x.numel() * x.element_size() for x in tensors)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("Set TRITON_INTERPRET=1: what is moved is counted in Triton's interpreter.")
    from triton.runtime.errors import InterpreterError

    torch.manual_seed(0)
    wanted = sys.argv[1:]
    counted = [case for case in cases() if case.counted and (not wanted or case.name in wanted)]
    found: dict[str, float | str] = {}
    for case in counted:
        try:
            found[case.name] = ratio(case)
        except InterpreterError as error:
            found[case.name] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
