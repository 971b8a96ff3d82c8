"""The folder kernels/ works in any project under any name, and in another's Llama.

Run: python -m pytest tests/test_vendor.py -q
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"

# What the folder offers, forward and backward, by the reference and by interpreted Triton.
EVERYTHING = """
import sys

import torch


class Only:
    '''Lets through torch, what it is made of, the standard library and the copied folder.'''

    allowed = {"torch", "triton", "borrowed_ops", "numpy", "sympy", "mpmath", "typing_extensions"}

    def find_spec(self, name, path=None, target=None):
        room = name.split(".")[0]
        own = room in sys.stdlib_module_names or room.startswith("_sysconfigdata")
        if not own and room not in self.allowed:
            raise ImportError(f"the copied folder imported {name}")


sys.meta_path.insert(0, Only())
import borrowed_ops as ops

torch.manual_seed(0)
data, head, norm = torch.randn(2, 5, 8), torch.randn(11, 8), torch.rand(8) + 0.5
cuts = torch.tensor([0, 3, 5, 10], dtype=torch.int32)
targets, lengths = torch.randint(11, (2, 5)), torch.tensor([5, 3])


def everything():
    x, weight, out = (t.clone().requires_grad_() for t in (data, norm, head))
    y, residual = ops.add_rms_norm(x, x, weight)
    y = ops.rms_norm(y, weight).view(2, 5, 2, 4)
    q, k = ops.rope(y, y[:, :, :1], *ops.rope_tables(5, 4))
    mixed = ops.attention(q, k, y[:, :, :1], cu_seqlens=cuts).reshape(2, 5, 8)
    hidden = ops.swiglu(mixed, residual)
    logprobs, entropy = ops.linear_logprobs(hidden, out, targets)
    loss = ops.linear_cross_entropy(hidden, out, targets)
    (loss - logprobs.sum() + entropy.sum()).backward()
    with torch.no_grad():
        last = ops.decode_attention(q[:, -1:], k, y[:, :, :1], lengths)
        tokens, drawn = ops.sample(hidden[:, 0] @ out.T, seeds=torch.arange(2))
        advantages, returns = ops.gae(logprobs, entropy, lengths)
    found = (loss, logprobs, entropy, last, tokens, drawn, advantages, returns)
    return *found, x.grad, weight.grad, out.grad


with ops.use_backend("reference"):
    expected = everything()
with ops.use_backend("triton"):
    found = everything()
assert torch.equal(found[4], expected[4])
for a, b in zip(found, expected):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
print(sorted(name for name in vars(ops) if callable(getattr(ops, name))))
assert not any(name.split(".")[0] == "puna" for name in sys.modules)
"""

# The same Llama, as transformers computes it and with the copied functions in its places.
LLAMA = """
from collections import Counter

import borrowed_ops as ops
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

config = LlamaConfig(
    vocab_size=53, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    attn_implementation="eager",
)
torch.manual_seed(0)
model = LlamaForCausalLM(config)
for name, parameter in model.named_parameters():
    if name.endswith("norm.weight"):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)  # not all ones
tokens = torch.randint(53, (2, 7))


def results(loss):
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


expected = results(model(tokens, labels=tokens).loss)
calls = Counter()


def counted(function):
    def call(*args, **kwargs):
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return call


rms_norm, rope, swiglu = counted(ops.rms_norm), counted(ops.rope), counted(ops.swiglu)
attention, cross_entropy = counted(ops.attention), counted(ops.linear_cross_entropy)


def norm(self, x):
    return rms_norm(x, self.weight, eps=self.variance_epsilon, cast="hf")


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    # Theirs are (1, T, D), each angle twice.
    half = [x.chunk(2, -1)[0].expand(len(q), -1, -1) for x in (cos, sin)]
    q, k = rope(q.transpose(1, 2), k.transpose(1, 2), *half)
    return q.transpose(1, 2), k.transpose(1, 2)


def attend(module, q, k, v, mask, scaling, **ignored):
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scaling), None


def feed_forward(self, x):
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


llama.LlamaRMSNorm.forward = norm
llama.LlamaMLP.forward = feed_forward
llama.apply_rotary_pos_emb = rotary
llama.eager_attention_forward = attend
for backend in ("reference", "triton"):
    calls.clear()
    with ops.use_backend(backend):
        hidden = model.model(tokens).last_hidden_state
        found = results(cross_entropy(hidden[:, :-1], model.lm_head.weight, tokens[:, 1:]))
    assert calls == {
        "rms_norm": 5, "rope": 2, "swiglu": 2, "attention": 2, "linear_cross_entropy": 1
    }, calls
    for name, truth in expected.items():
        torch.testing.assert_close(
            found[name], truth, rtol=1e-5, atol=1e-5, msg=lambda m: f"{backend} {name}: {m}"
        )
print("same")
"""


def run_beside_a_copy(program: str, folder: Path) -> str:
    """What the program prints where the only thing of ours is kernels/ as `borrowed_ops`."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, folder / "borrowed_ops", ignore=ignored)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_works_elsewhere_under_another_name(tmp_path):
    pytest.importorskip("triton")
    shown = run_beside_a_copy(EVERYTHING, tmp_path)
    from puna import kernels

    public = {name for name in vars(kernels) if callable(getattr(kernels, name))}
    assert shown.strip() == str(sorted(public))
    assert all(f"ops.{name}(" in EVERYTHING for name in public)


def test_the_functions_take_their_places_in_the_llama_of_transformers(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    assert run_beside_a_copy(LLAMA, tmp_path).strip() == "same"


def test_the_folder_carries_its_licence_and_manual():
    root = KERNELS.parent
    assert (KERNELS / "LICENSE").read_text() == (root / "LICENSE").read_text()
    manual = (KERNELS / "README.md").read_text()
    for source in KERNELS.rglob("*.py"):
        name = source.relative_to(KERNELS).with_suffix("").as_posix()
        if source.stem != "__init__":
            assert f"`{name}`" in manual, f"{name} is not in kernels/README.md"
    shown = set(re.findall(r"^\| `([\w/]+)` \|", manual.partition("## What is where")[2], re.M))
    assert all((KERNELS / f"{name}.py").is_file() for name in shown) and shown
