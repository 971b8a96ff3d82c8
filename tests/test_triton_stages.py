"""Stages on Triton's kernels, beside the reference: what a model hands to them in training, packed
rows, shared prompts, chosen tokens, and what comes back.

Run: python -m pytest tests/test_triton_stages.py -q
"""

import json
from itertools import islice

import pytest

from puna.cli.main import main
from puna.core.ops import use_backend

STAGES = {  # a step or two: interpreted, each takes seconds
    "pretrain": "--data {0}/text.jsonl --tokenizer {0}/tokenizer.model --context 32 --batch 2 "
    "--steps 2 --eval-share 0",
    "sft": "--model {0}/lm --data {1}/dialogues.jsonl --batch 4 --epochs 2 --eval-share 0",
    "reward": "--model {0}/lm --data {1}/preferences.jsonl --batch 2 --safety-weight 0.5 "
    "--eval-share 0",
    "ppo": "--policy {0}/lm --helpfulness {0}/helpfulness --safety {0}/safety "
    "--prompts {1}/prompts.jsonl --iterations 2 --batch 2 --minibatch 1 --max-new-tokens 2 "
    "--critic-warmup 1",
}
FIGURES = {"loss", "grad_norm", "value_loss", "policy_loss", "critic_grad_norm", "policy_grad_norm",
           "entropy", "ratio", "kl", "reward"}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_figures_are_the_references(stage, triton_device, tiny, tmp_path):
    for name in ("dialogues", "preferences", "prompts"):
        with open(tiny / f"{name}.jsonl") as rows:
            (tmp_path / f"{name}.jsonl").write_text("".join(islice(rows, 4)))
    figures = []
    for backend in ("reference", "triton"):
        words = [stage, *STAGES[stage].format(tiny, tmp_path).split(), "--lr", "1e-3"]
        place = ["--device", str(triton_device), "--out", str(tmp_path / backend)]
        with use_backend(backend):
            assert main([*words, *place, "--dtype", "fp32"]) == 0
        (path,) = (tmp_path / backend).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        figures.append([{key: row[key] for key in FIGURES & row.keys()} for row in rows])
    reference, found = figures
    assert len(found) == len(reference) >= 2 and any(found)
    for ours, theirs in zip(found, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-4)
