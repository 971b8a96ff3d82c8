"""The folder kernels/ works in any project under any name.

Run: python -m pytest tests/test_vendor.py -q
"""

import shutil
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"

# Everything in one forward and backward: what the folder offers, without the rest of Puna.
PROGRAM = """
import sys

import torch


class Only:
    '''Lets through torch, what it is made of, the standard library and the copied folder.'''

    allowed = {"torch", "triton", "borrowed_ops", "numpy", "sympy", "mpmath", "typing_extensions"}

    def find_spec(self, name, path=None, target=None):
        room = name.split(".")[0]
        if room not in self.allowed | set(sys.stdlib_module_names):
            raise ImportError(f"the copied folder imported {name}")


sys.meta_path.insert(0, Only())
import borrowed_ops as ops

torch.manual_seed(0)
x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.ones(8, requires_grad=True)
y, residual = ops.add_rms_norm(x, x, weight)
y = ops.rms_norm(y, weight).view(2, 5, 2, 4)
q, k = ops.rope(y, y[:, :, :1], *ops.rope_tables(5, 4))
cuts = torch.tensor([0, 3, 5, 10], dtype=torch.int32)
out = ops.attention(q, k, y[:, :, :1], cu_seqlens=cuts).reshape(2, 5, 8)
hidden = ops.swiglu(out, residual)
targets = torch.randint(11, (2, 5))
head = torch.randn(11, 8)
logprobs, entropy = ops.linear_logprobs(hidden, head, targets)
loss = ops.linear_cross_entropy(hidden, head, targets)
(loss - logprobs.sum() + entropy.sum()).backward()
assert x.grad.isfinite().all() and weight.grad.isfinite().all()

lengths = torch.tensor([5, 3])
ops.decode_attention(q[:, -1:], k, y[:, :, :1], lengths)
tokens, _ = ops.sample(hidden[:, 0].detach() @ head.T, seeds=torch.arange(2))
assert tokens.shape == (2,)
ops.gae(logprobs.detach(), entropy.detach(), lengths)
print(sorted(name for name in vars(ops) if callable(getattr(ops, name))))
assert not any(name.split(".")[0] == "puna" for name in sys.modules)
"""


def test_the_folder_works_elsewhere_under_another_name(tmp_path):
    shutil.copytree(
        KERNELS, tmp_path / "borrowed_ops", ignore=shutil.ignore_patterns("__pycache__")
    )
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("attention", "linear_cross_entropy", "rms_norm", "sample"):
        assert f"'{name}'" in done.stdout


def test_the_folder_carries_its_licence_and_manual():
    root = KERNELS.parent
    assert (KERNELS / "LICENSE").read_text() == (root / "LICENSE").read_text()
    manual = (KERNELS / "README.md").read_text()
    for source in KERNELS.glob("*.py"):
        if source.stem != "__init__":
            assert f"`{source.stem}`" in manual, f"{source.name} is not in kernels/README.md"
