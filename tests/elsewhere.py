"""A device that is not the CPU, without a GPU: its tensors hold values that only it can read.

`install()` adds the device "elsewhere" to this process, for good. What it computes is what a CPU
computes; but as on a GPU an operation refuses tensors of two devices (numbers aside), and numpy and
the native engine cannot reach them. So a stage that runs there, to the same figures, leaves none of
its tensors behind on the CPU. What asks for CUDA by name (Triton, streams, NCCL) is not tried.

`python tests/elsewhere.py COMMANDS` runs Puna's command for each line of a file (a list of words in
JSON) in a process of its own and prints [status, what it said] for each. PyTorch's autograd must
not have run before there is the device, so it cannot be tests' own process.
"""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
COPIES = {"aten::_to_copy", "aten::copy_"}
# A GPU takes a CPU's number as a factor or a summand, not as one of several parts.
OF_PARTS = ("aten::stack", "aten::cat", "aten::index", "aten::_index_put")
_kept: list[torch.library.Library] = []


class Elsewhere(Tensor):
    @staticmethod
    def __new__(cls, here: Tensor) -> "Elsewhere":
        with torch.inference_mode(False):  # a view from within is a tensor like any other
            made = Tensor._make_wrapper_subclass(
                cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
                dtype=here.dtype, device=f"{NAME}:0", requires_grad=False,
            )  # fmt: skip
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return run(operation, args, kwargs or {})

    # What PyTorch does past the dispatcher

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 tensor to numpy; copy it to the CPU first")

    __array__ = numpy

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def __getitem__(self, at: Any) -> Any:
        return super().__getitem__(without_lists(at))

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(without_lists(at), value)


def without_lists(at: Any) -> Any:
    if isinstance(at, tuple):
        return tuple(map(without_lists, at))
    return torch.tensor(at, device=NAME) if isinstance(at, list) else at


def run(operation: Any, args: tuple, kwargs: dict) -> Any:
    name, device = operation.name(), kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [isinstance(x, Elsewhere) for x in tensors]
    if any(there) and name not in COPIES:
        check_devices(name, tensors)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        goes_there = torch.device(device).type == NAME
    else:
        goes_there = there[0] if name == "aten::copy_" else any(there)
    mine = tree_map(lambda x: x.here if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = operation(*mine[0], **mine[1])
    if name == "aten::_to_copy" and any(out is x for x in tree_leaves(mine)):
        out = out.clone()
    known = {id(x.here): x for x in tensors if isinstance(x, Elsewhere)}
    assert all(x.shape == x.here.shape for x in known.values()), f"{name} changed a shape in place"

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not goes_there:
            return x
        return known[id(x)] if id(x) in known else Elsewhere(x)

    return tree_map(placed, out)


def check_devices(name: str, tensors: list[Tensor]) -> None:
    for x in tensors:
        number = x.dim() == 0 and not name.startswith(OF_PARTS)
        if not isinstance(x, Elsewhere) and not number:
            found = [each.device for each in tensors]
            raise RuntimeError(f"{name} expected all tensors on the same device, found {found}")


def on_arrival(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A constructor that fills or resizes what it makes past the dispatcher: made here, and
    copied."""

    def made(*args: Any, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **options)
        if args and isinstance(args[0], Elsewhere):
            return args[0].to(options.get("dtype") or args[0].dtype)
        return make(*args, **options).to(device)

    return made


def install() -> None:
    """Once a process."""
    _setup_privateuseone_for_python_backend(NAME)
    _kept.append(torch.library.Library("_", "IMPL"))
    _kept[0].fallback(lambda operation, *a, **k: run(operation, a, k), "PrivateUse1")
    for name in ("tensor", "as_tensor", "asarray", "arange", "linspace", "randperm", "eye"):
        setattr(torch, name, on_arrival(getattr(torch, name)))


def ended(words: list[str]) -> tuple[int, str]:
    """(status, what it said) of Puna's command in a child of this process."""
    from puna.cli.main import main

    read, write = os.pipe()
    if not os.fork():
        os.close(read)
        sys.stdout = sys.stderr = said = io.StringIO()
        sys.stdin = io.StringIO("red\n")
        sys.argv = ["puna"]
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
        with os.fdopen(write, "w") as file:
            json.dump([status, said.getvalue()], file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said_all = file.read()
    os.wait()
    status, said = json.loads(said_all) if said_all else (None, "it ended without a word")
    return status, said


if __name__ == "__main__":
    torch.set_num_threads(1)
    install()
    for line in Path(sys.argv[1]).read_text().splitlines():
        print(json.dumps(ended(json.loads(line))), flush=True)
