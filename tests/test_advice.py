"""Advice names flags of the command that somebody typed, also where a stage of it says so.
Run: python -m pytest tests/test_advice.py -q"""

import ast
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_hands import config_of
from test_layers import parsed, sources

from puna.trainers import ppo
from puna.trainers.rl.config import PPOConfig
from puna.trainers.train import claim, loop, run, state
from puna.trainers.train.advice import commanded

FLAG = re.compile(r"--([a-z][a-z-]*)")
# Rows that a verb alone reads, what reads the line itself, and another program's flags.
OTHERS = {"config.py", "arguments.py", "mistaken.py", "layouts.py", "formats.py", "corpus.py",
          "engine.py", "score.py", "evaluate.py", "sample.py"}  # fmt: skip
OWN = ("give --model 7b", "name a --tokenizer", "files with --data", "taken with --amend")
"""said of what a loop or a demo always gives, or in the help"""
EVERYWHERE = {"out", "seed"}


def two_damaged(tmp_path):
    for name in ("step-000001", "step-000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    run.newest(tmp_path / "checkpoints", fall_back=False)


def not_finite(tmp_path):
    kept = SimpleNamespace(checkpoint=None, settle=lambda: None)
    loop.check_finite(kept, 3, loss=float("nan"))


def unfinished(tmp_path):
    config = SimpleNamespace(unfinished="mask", batch=4, max_new_tokens=8)
    ppo.check_finished(config, SimpleNamespace(finished=torch.zeros(4, dtype=torch.bool)))


PLACES = {
    "other terms": lambda path: claim.refuse(
        PPOConfig(out=path, policy=path, prompts=[path]), [], ["lr 2 where it was 1"]
    ),
    "a damaged checkpoint": two_damaged,
    "a damaged state": lambda path: state.read_state(path),
    "no number": not_finite,
    "unfinished answers": unfinished,
}


@pytest.mark.parametrize("verb", ["demo", "demo real", "reproduce", "rlhf", "ppo"])
@pytest.mark.parametrize("place", PLACES)
def test_flags_are_of_the_command(verb, place, tmp_path):
    cls = config_of(verb)
    known = {field.name for field in dataclasses.fields(cls)}
    command = SimpleNamespace(**dict.fromkeys(known))
    with commanded(command), pytest.raises((ValueError, RuntimeError)) as said:
        PLACES[place](tmp_path)
    named = {name.replace("-", "_") for name in FLAG.findall(str(said.value))}
    assert named <= known, said.value
    if verb == "ppo":  # the flags are still told where there are such
        assert named & {"amend", "resume"}


def flags_outside_advice(path: Path) -> list[tuple[str, int]]:
    tree = parsed(path)
    told = {
        inside
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "advice")
        or isinstance(node, ast.Expr)  # a docstring
        and isinstance(node.value, ast.Constant)
        for inside in ast.walk(node)
    }
    return [
        (path.name, node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in told
        if {*FLAG.findall(node.value)} - EVERYWHERE
        if not any(each in node.value for each in OWN)
    ]


def test_stages_name_flags_in_advice_alone():
    found = [
        each
        for path in sources("trainers")
        if path.name not in OTHERS
        for each in flags_outside_advice(path)
    ]
    assert not found
