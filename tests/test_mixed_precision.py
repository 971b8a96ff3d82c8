"""The operations under FSDP2's mixed precision: weights stored in fp32 and multiplied in bf16.

This file is also what torchrun starts: `torchrun tests/test_mixed_precision.py FOLDER` trains one
step on each rank's half of a batch, once with every weight gathered in bf16 and once with the
norms' in fp32, by the reference and by interpreted Triton. The test's own process does the same
to the whole batch with plain tensors of the same dtypes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from puna.core import parallel
from puna.core.config import ModelConfig
from puna.core.model import RMSNorm, Transformer
from puna.core.ops import linear_cross_entropy, linear_logprobs, use_backend

# 3 query heads to a key/value head, sizes that two ranks do not share evenly
CONFIG = ModelConfig(18, 1, 3, 1, 26, vocab_size=37, context=16)
BACKENDS = ["reference", "triton"]
NORMS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def fresh() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    for module in norms(model):  # not all ones, and not what bf16 can hold
        torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
    return model


def norms(model: Transformer) -> list[RMSNorm]:
    return [module for module in model.modules() if isinstance(module, RMSNorm)]


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(CONFIG.vocab_size, (4, 6), generator=generator)


def sharded(model: Transformer, norm_dtype: torch.dtype) -> Transformer:
    def policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)

    if norm_dtype != torch.bfloat16:
        for module in norms(model):
            fully_shard(module, mp_policy=policy(norm_dtype))
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy(torch.bfloat16))
    return fully_shard(model, mp_policy=policy(torch.bfloat16), reshard_after_forward=False)


def step(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """The mean loss with an entropy bonus, as PPO has it, and every gradient, whole."""
    seen: set[torch.dtype] = set()
    handles = [
        module.register_forward_hook(lambda m, i, out: seen.update({m.weight.dtype, out.dtype}))
        for module in norms(model)
    ]
    hidden, targets = model(tokens[:, :-1]), tokens[:, 1:]
    assert hidden.dtype == model.head_weight.dtype
    loss = linear_cross_entropy(hidden, model.head_weight, targets)
    logprobs, entropy = linear_logprobs(hidden, model.head_weight, targets)
    loss = loss - 0.5 * entropy.mean() - 0.25 * logprobs.mean()
    loss.backward()
    for handle in handles:
        handle.remove()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = parallel.full(gradient).float()
        found[f"dtype of {name}"] = torch.tensor(float(gradient.dtype == torch.float32))
    found["norms saw fp32"] = torch.tensor(float(torch.float32 in seen))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def run_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    parallel.init()
    mine = batch().chunk(parallel.world_size())[parallel.rank()]
    for backend in BACKENDS:
        for name, dtype in NORMS.items():
            with use_backend(backend):
                found = step(sharded(fresh(), dtype), mine)
            found["loss"] = parallel.all_sum(found["loss"]) / parallel.world_size()
            if parallel.is_main():
                save_file(found, folder / f"{backend}-{name}.safetensors")
    parallel.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("mixed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    subprocess.run([*command, __file__, str(folder)], check=True, timeout=600, env=environment)
    return folder


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_in_mixed_precision_do_what_one_process_does(
    two: Path, backend: str, norm: str
) -> None:
    """Against fp64, their gradients are as good as one process's in the same dtypes."""
    found = load_file(two / f"{backend}-{norm}.safetensors")
    plain = fresh().bfloat16()
    for module, stored in zip(norms(plain), norms(fresh()), strict=True):
        module.weight.data = stored.weight.detach().to(NORMS[norm])
    with use_backend("reference"):
        alone, exact = step(plain, batch()), step(fresh().double(), batch())
    assert found["norms saw fp32"] == alone["norms saw fp32"] == (norm == "fp32")
    assert float(found["loss"]) == pytest.approx(float(alone["loss"]), rel=2e-4)
    assert float(found["loss"]) == pytest.approx(float(exact["loss"]), rel=1e-3)
    for name, _ in fresh().named_parameters():
        assert found[f"dtype of {name}"], "gradients are reduced in fp32"
        truth = exact[name]
        error, allowed = (float((x[name] - truth).norm() / truth.norm()) for x in (found, alone))
        assert error <= 2 * allowed + 2**-8, name


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
