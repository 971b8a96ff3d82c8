"""Greedy tokens by Triton's kernels, slots refilled: those of PyTorch on a CPU.

Run: python -m pytest tests/test_gpu_generation.py -q
"""

import pytest
import torch

from puna.core.config import ModelConfig
from puna.core.generation.generate import generate, stream
from puna.core.model import Transformer
from puna.core.ops import use_backend

SHAPE = ModelConfig(64, 2, 4, 2, 96, vocab_size=211, context=96)
EOS = 7
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # of logits whose spread is about 20


def model_of(device, dtype):
    """Random weights, scaled so that the next token is not a matter of indifference."""
    model = Transformer(SHAPE)
    model.init_weights(seed=3)
    with torch.no_grad():
        model.head_weight.mul_(60)
    return model.to(device, dtype)


def prompts(count):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (count,), generator=draw).tolist()
    ids = range(SHAPE.vocab_size)
    return [torch.randint(len(ids), (n,), generator=draw).tolist() for n in lengths]


def right(model, prompt, answer, near):
    """Whether each token has the largest logit after what stands before it, up to a near-tie."""
    with torch.no_grad(), use_backend("reference"):
        hidden = model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
        logits = model.logits(hidden).float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return bool((chosen >= logits.max(-1).values - near).all())


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("slots", [3, 256])
def test_greedy_tokens_are_the_cpus(triton_device, dtype, slots):
    """Seven prompts in three slots: an answer that ends makes room for the next."""
    few = triton_device.type == "cpu"  # interpreted, seconds a token
    if few and slots > 3:
        pytest.skip("in the interpreter three slots are enough")
    given, new = prompts(7 if few else 60), 2 if few else 70
    options = {"max_new_tokens": new, "eos_id": EOS, "temperature": 0.0}
    reference = model_of("cpu", dtype)
    with use_backend("reference"):
        wanted = generate(reference, given, **options)
    with use_backend("triton"):
        found = generate(model_of(triton_device, dtype), given, **options, batch_size=slots)
    assert few or any(each.finished for each in found)
    alike = 0
    for prompt, ours, theirs in zip(given, found, wanted, strict=True):
        assert right(reference, prompt, ours.tokens, NEAR[dtype])
        alike += ours.tokens == theirs.tokens
        if ours.tokens == theirs.tokens:
            assert ours.finished == theirs.finished
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=NEAR[dtype])
    assert alike >= (len(given) if dtype == torch.float32 else 0.5 * len(given))


def test_a_stream_is_the_answer(triton_device):
    model, options = model_of(triton_device, torch.float32), {"max_new_tokens": 3, "eos_id": None}
    (prompt,) = prompts(1)
    with use_backend("triton"):
        (whole,) = generate(model, [prompt], temperature=0.0, **options)
        assert list(stream(model, prompt, temperature=0.0, **options)) == whole.tokens
