"""Kernels compiled for GPUs that are not there, and what their machine code says.

`record` notes what a launcher would launch, `lower` compiles that with the specialisation that
triton itself would choose, `facts` reads the result.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16",
    torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    kernel: Any
    values: dict[str, Any]  # by parameter
    options: dict[str, Any]


class Facts(NamedTuple):
    registers: int  # a thread's
    spilled: int  # bytes of a thread's registers that went to memory
    shared: int  # bytes a program takes
    widest: int  # bits of the loads of large tiles; 0: the code names no width
    narrowest: int
    products: dict[str, int]  # tensor-core instructions by name
    bf16: bool  # some of them take bf16


@contextmanager
def recording(launches: list[Launch]) -> Iterator[None]:
    """Inside, launches are noted and not made."""

    def note(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        values = {p.name: p.default for p in self.params if p.has_default}
        values |= dict(zip(self.arg_names, args, strict=False))
        values |= {name: kwargs.pop(name) for name in list(kwargs) if name in self.arg_names}
        launches.append(Launch(self, values, kwargs))

    made, JITFunction.run = JITFunction.run, note
    try:
        yield
    finally:
        JITFunction.run = made


def record(call: Callable[[], Any]) -> list[Launch]:
    """What `call` launches, each different kernel or specialisation once."""
    launches: list[Launch] = []
    with recording(launches):
        call()
    seen: dict[tuple, Launch] = {}
    for launch in launches:
        source = _specialised(launch, TARGETS["sm_90"])
        key = launch.kernel, str(source), str(launch.options)
        seen.setdefault(key, launch)
    return list(seen.values())


def _specialised(launch: Launch, target: GPUTarget) -> tuple[dict, dict, dict]:
    """(types, constants, attributes) of a launch, as triton would choose them."""
    backend = make_backend(target)
    types, constants, attributes = {}, {}, {}
    for place, param in enumerate(launch.kernel.params):
        value = launch.values[param.name]
        free = not param.do_not_specialize
        align = free and not param.do_not_specialize_on_alignment
        found = ""
        if param.is_constexpr or value is None or (value is True) or (value is False):
            kind = "constexpr" if param.is_constexpr or value is None else "u1"
        elif isinstance(value, Tensor):
            kind = TYPES[value.dtype]
            found = backend.get_tensor_specialization(value, align=align) if free else ""
        elif isinstance(value, int):
            kind = "constexpr" if free and value == 1 else _integer(value)
            found = backend.get_int_specialization(value, align=align) if free else ""
        else:
            kind = "fp32"
        types[param.name] = kind
        if kind == "constexpr":
            constants[(place,)] = value
        elif found:
            attributes[(place,)] = backend.parse_attr(found)
    return types, constants, attributes


def _integer(value: int) -> str:
    if -(2**31) <= value < 2**31:
        return "i32"
    return "i64" if value < 2**63 else "u64"


def lower(launch: Launch, target: str) -> Any:
    """The compiled kernel."""
    types, constants, attributes = _specialised(launch, TARGETS[target])
    source = ASTSource(launch.kernel, types, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=dict(launch.options))


def facts(compiled: Any) -> Facts:
    asm = compiled.asm
    large = _large_tiles(asm["ttir"])
    if "cubin" in asm:
        text = asm["ptx"]
        registers, spilled = _usage(asm["cubin"])
        names = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)([.\w:]*)", text)
        bf16 = any(".bf16" in kind or "kind::f16" in kind for _, kind in names)
    else:
        text = asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
        spilled = int(re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)[0])
        names = re.findall(r"\b(v_mfma)(\w*)", text)
        bf16 = any("bf16" in kind for _, kind in names)
    products: dict[str, int] = {}
    for name, _ in names:
        name = name.split(".")[0]
        products[name] = products.get(name, 0) + 1
    widths = {bits for place, bits in _loads(text) if place in large}
    return Facts(
        registers, spilled, compiled.metadata.shared, max(widths, default=0),
        min(widths, default=0), products, bf16,
    )  # fmt: skip


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / "cuobjdump"), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return found["REG"], found["STACK"] + found["LOCAL"]


Place = tuple[str, int, int]  # file, line, column


def _large_tiles(ttir: str) -> set[Place]:
    """Where the source loads its largest tiles, and those of at least an eighth of their bytes.

    The others, a number a row or the angles of one token, have too few bytes for a warp.
    """
    named = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", ttir, re.M))

    def resolve(text: str) -> Place | None:
        exact = re.match(r'"([^"]*)":(\d+):(\d+)', text)
        if exact:
            return Path(exact[1]).name, int(exact[2]), int(exact[3])
        inner = re.search(r"#loc\w*", text)  # the callee of a call, what a name names
        return resolve(named[inner[0]]) if inner else None

    sizes: dict[Place, int] = {}
    pattern = r"tt\.load .*?tensor<((?:\d+x)+)!tt\.ptr<(\w+)>.*?loc\((.*)\)$"
    for shape, kind, where in re.findall(pattern, ttir, re.M):
        place = resolve(where)
        count = int(re.sub(r"\D", "", kind)) // 8
        for length in shape.split("x")[:-1]:
            count *= int(length)
        if place:
            sizes[place] = max(count, sizes.get(place, 0))
    return {place for place, size in sizes.items() if size * 8 >= max(sizes.values())}


def _loads(text: str) -> Iterator[tuple[Place, int]]:
    """(where in the source, bits a thread) of each load from global memory in the assembly."""
    named = re.findall(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text, re.M)
    files = {number: Path(path).name for number, path in named}
    place, inline, stated = ("", 0, 0), False, False
    for line in text.splitlines():
        if "inline asm" in line:  # of its lines the first has the place, the others a count
            inline, stated = "begin" in line, False
        elif found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)", line):
            if not stated:
                place = files.get(found[1], ""), int(found[2]), int(found[3])
            stated = inline
        elif bits := _bits(line):
            yield place, bits


def _bits(line: str) -> int:
    if found := re.search(
        r"\bld\.global(?:\.(?!v\d|[bfsu]\d)[\w:]+)*(?:\.v(\d))?\.[bfsu](\d+)", line
    ):
        return int(found[1] or 1) * int(found[2])
    if found := re.search(r"\bcp\.async\.c[ag]\.shared\.global.*?\],.*?\],\s*(\w+)", line):
        return int(found[1], 0) * 8
    if found := re.search(r"\b(?:global|buffer)_load_(\w+)", line):
        sized = re.match(r"(?:lds_)?(dword(?:x(\d))?|[us]?byte|[us]?short)", found[1])
        if sized and sized[1].startswith("dword"):
            return 32 * int(sized[2] or 1)
        return 16 if "short" in found[1] else 8
    return 0
