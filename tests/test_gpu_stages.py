"""Every stage of training, 20 steps in bf16, beside the same steps in fp32 on a CPU.

Run: python -m pytest tests/test_gpu_stages.py -q
"""

import json

import pytest
import torch

from puna.cli.main import main

# (arguments, whether its rows are sampled: then a draw near an edge may fall to the other side)
STAGES = {
    "pretrain": (
        "--data {0}/text.jsonl --tokenizer {0}/tokenizer.model --size mini --context 64 --batch 4 "
        "--steps 20 --eval-share 0",
        False,
    ),
    "sft": ("--model {0}/lm --data {0}/dialogues.jsonl --batch 4 --epochs 8", False),
    "reward": (
        "--model {0}/lm --data {0}/preferences.jsonl --batch 8 --epochs 4 --safety-weight 0.5",
        False,
    ),
    "rejection": (
        "--policy {0}/lm --helpfulness {0}/helpfulness --safety {0}/safety --samples 3 "
        "--prompts {0}/prompts.jsonl --max-new-tokens 6 --batch 2 --epochs 20 --row-tokens 40",
        True,
    ),
    "gatt": (
        "--model {0}/lm --dialogues {0}/ghosts.jsonl --samples 2 --max-new-tokens 6 --batch 2 "
        "--epochs 20 --targets 2",
        True,
    ),
    "distill": (
        "--policy {0}/chat --safety {0}/safety --prompts {0}/prompts.jsonl "
        "--max-new-tokens 24 --mix {0}/dialogues.jsonl --batch 2 --epochs 4",
        True,
    ),
}
PPO = (
    "--policy {0}/lm --helpfulness {0}/helpfulness --safety {0}/safety --prompts {0}/prompts.jsonl "
    "--iterations 20 --batch 8 --minibatch 8 --max-new-tokens 6"
)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request):
    return request.param


def steps(stage, arguments, tiny, out, device, dtype):
    """The rows of its metrics that are steps."""
    command = [stage, *arguments.format(tiny).split(), "--lr", "1e-3", "--save-every", "1000"]
    assert main([*command, "--device", device, "--dtype", dtype, "--out", str(out)]) == 0
    (path,) = out.rglob("metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [row for row in rows if "lr" in row]
    assert len(found) >= 20
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_losses_in_bf16_follow_those_in_fp32(stage, device, tiny, tmp_path):
    arguments, drawn = STAGES[stage]
    exact = steps(stage, arguments, tiny, tmp_path / "fp32", "cpu", "fp32")
    found = steps(stage, arguments, tiny, tmp_path / "bf16", device, "bf16")
    exact, found = ([row["loss"] for row in rows] for rows in (exact, found))
    if not drawn:
        assert found == pytest.approx(exact, rel=0.01)
    else:
        least = min(len(exact), len(found))
        mean, right = (sum(losses[:least]) / least for losses in (found, exact))
        assert mean == pytest.approx(right, rel=0.05)
    assert exact != found, "bf16 is not fp32: one of the two was not asked for"
    assert sum(found[-5:]) < sum(found[:5])


def test_ppo_in_bf16_follows_that_in_fp32(device, tiny, tmp_path):
    exact = steps("ppo", PPO, tiny, tmp_path / "fp32", "cpu", "fp32")
    found = steps("ppo", PPO, tiny, tmp_path / "bf16", device, "bf16")
    for row in found:  # the log-probs of drawing are those of training
        assert row["ratio"] == pytest.approx(1, abs=0.01) and row["clip_fraction"] < 0.05
    first, right = found[0], exact[0]
    assert first["value_loss"] == pytest.approx(right["value_loss"], rel=0.2)
    assert first["entropy"] == pytest.approx(right["entropy"], rel=0.01)
    mean, truth = (sum(row["value_loss"] for row in rows) / 20 for rows in (found, exact))
    assert mean == pytest.approx(truth, rel=0.3)
    assert found[-1]["value_loss"] < found[0]["value_loss"]
