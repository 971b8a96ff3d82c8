"""Every verb that has a device, on one that is not the CPU (`elsewhere`): to its end, and each
stage to the figures of a CPU.

Run: python -m pytest tests/test_elsewhere.py -q
"""

import json
import subprocess
import sys
from pathlib import Path

import elsewhere
import pytest
from test_gpu_stages import PPO, STAGES
from test_hands import VERBS, hints, words_of

STEPS = {stage: arguments for stage, (arguments, _) in STAGES.items()} | {"ppo": PPO}
LONGER = {"sft": ("--epochs", "9"), "ppo": ("--iterations", "22")}  # from a checkpoint
OTHERS = [  # benches name their devices; annotate serves a page
    verb for verb in VERBS
    if "device" in hints(verb) and not verb.startswith(("bench", "annotate")) and verb not in STEPS
]  # fmt: skip


def stage(name, tiny, out, device):
    words = [name, *STEPS[name].format(tiny).split(), "--lr", "1e-3", "--save-every", "10"]
    return [*words, "--device", device, "--out", str(out / device / name)]


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """(folder, {(verb, device[, call]): (status, what it said)}), run one after another."""
    out, commands = tmp_path_factory.mktemp("there"), {}
    for name in STEPS:
        for device in ("cpu", elsewhere.NAME):
            commands[name, device] = stage(name, tiny, out, device)
            if name in LONGER:
                commands[name, device, 2] = [*commands[name, device], *LONGER[name], "--amend"]
    for verb in OTHERS:
        (work := out / "others" / verb).mkdir(parents=True)
        words = [each for each in words_of(verb, tiny, work) if each not in ("--device", "cpu")]
        commands[verb, ""] = [*words, "--device", elsewhere.NAME]
    (out / "commands").write_text("\n".join(map(json.dumps, commands.values())))
    program = [sys.executable, str(Path(elsewhere.__file__)), str(out / "commands")]
    found = subprocess.run(program, capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(lines) == len(commands), found.stderr[-2000:]
    return out, dict(zip(commands, lines, strict=True))


@pytest.mark.parametrize("verb", OTHERS)
def test_a_verb_comes_to_its_end(verb, done):
    status, said = done[1][verb, ""]
    if verb == "rlhf":  # to where people are asked
        assert status == 1 and "wait for an annotator" in said, said
    else:
        assert status == 0, said


@pytest.mark.parametrize("name", STEPS)
def test_a_stage_has_the_figures_of_a_cpu(name, done):
    out, results = done
    figures = []
    for device in ("cpu", elsewhere.NAME):
        for status, said in (results[key] for key in results if key[:2] == (name, device)):
            assert status == 0, said
        (path,) = (out / device / name).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        figures.append([row.get("loss", row.get("value_loss")) for row in rows if "lr" in row])
    assert len(figures[0]) >= (21 if name in LONGER else 20)
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)


@pytest.mark.parametrize(
    "mixed", ["x + torch.ones(3)", "torch.stack([x.sum(), torch.tensor(1.0)])", "x.numpy()",
              "x[torch.tensor([0])]", "torch.nn.functional.linear(x, torch.ones(2, 3))"],
)  # fmt: skip
def test_what_a_gpu_refuses_is_refused(mixed):
    begin = "import torch, elsewhere; elsewhere.install(); x = torch.ones(3, device='elsewhere')"
    program = [sys.executable, "-c", f"{begin}; print((x * torch.tensor(2.0)).tolist()); {mixed}"]
    found = subprocess.run(
        program, capture_output=True, text=True, cwd=Path(elsewhere.__file__).parent
    )
    assert found.stdout == "[2.0, 2.0, 2.0]\n" and found.returncode == 1
    assert "same device" in found.stderr or "to numpy" in found.stderr
