"""The stages called from Python: the processes of torchrun find each other, and what a notebook
has set before does no harm. Run: python -m pytest tests/test_from_python.py -q"""

import json
from pathlib import Path

import pytest
import torch
from campaign.kills import finish, starter

from puna.core.checkpoint.folder import load_model
from puna.trainers import sft

CALLS = {  # with functions of one's own, which no command line can give
    "sft": "puna.sft(puna.SFTConfig(model=tiny / 'chat', data=[tiny / 'dialogues.jsonl'], "
    "out=out, device='cpu', batch=4, epochs=1, lr=1e-3, eval_share=0.0))",
    "ppo": "puna.ppo(puna.PPOConfig(policy=tiny / 'chat', prompts=[tiny / 'prompts.jsonl'], "
    "out=out, device='cpu', critic='policy', iterations=2, batch=4, minibatch=4, lr=1e-3, "
    "max_new_tokens=6), reward=lambda answers: [float(len(each.text)) for each in answers])",
    "sample": "puna.sample(puna.SampleConfig(policy=tiny / 'chat', "
    "prompts=[tiny / 'prompts.jsonl'], out=out, device='cpu', samples=2, max_new_tokens=6))",
}


def numbers(out: Path) -> list:
    """What the run says of its steps, or its answers."""
    file = next(file for file in (out / "metrics.jsonl", out / "samples.jsonl") if file.exists())
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    names = ("step", "loss", "reward", "kl", "prompt", "tokens")
    return [{name: row[name] for name in names if name in row} for row in rows]


@pytest.mark.parametrize("stage", CALLS)
def test_two_ranks_do_one_run(tiny, tmp_path, stage):
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"run-{ranks}"
        code = f"import puna\nfrom pathlib import Path\ntiny, out = Path({str(tiny)!r}), "
        finish(starter()(f"{code}Path({str(out)!r})\n{CALLS[stage]}", ranks))
        found.append(numbers(out))
    assert found[0] and len(found[0]) == len(found[1])
    for one, two in zip(*found, strict=True):
        for name, value in one.items():
            same = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert two[name] == same


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on(tiny, tmp_path, before):
    config = sft.SFTConfig(
        model=tiny / "chat", data=[tiny / "dialogues.jsonl"], out=tmp_path / "run", device="cpu",
        batch=4, epochs=1, lr=1e-2,
    )  # fmt: skip
    with before():
        sft.run(config)
        assert not torch.is_grad_enabled()
    ours, theirs = (dict(load_model(path).named_parameters())
                    for path in (tmp_path / "run" / "model", tiny / "chat"))  # fmt: skip
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
