"""No stage has an option that it does not read.

Run: python -m pytest tests/test_options_read.py -q
"""

import dataclasses
import sys
from pathlib import Path

import pytest
from test_hands import OUT, config_of, words_of

from puna.cli.main import main

# What looks at every option alike: to write it, compare it, or see whether it can be.
ALIKE = ("dataclasses.py", "ranges.py", "claim.py", "config.py", "inputs.py", "values.py",
         "paths.py", "_struct_spec_dataclass.py")  # fmt: skip
WHOLE = sorted(
    OUT - {"demo", "demo real", "reproduce", "rlhf"}
)  # those wait for people, or minutes
RARELY = {  # options that these short runs do not come to -> when they are read
    "amend": "a run that is there has other options",
    "keep": "a checkpoint is written",
    "on_error": "a row cannot be read",
    "engine": "a server draws",
    "timeout": "ranks or a server are waited for",
    "safety": "reward models are named",
    "helpfulness": "reward models are named",
    "combine": "reward models are named",
    "safety_threshold": "reward models are named",
    "micro_batch_tokens": "reward models are named",
    "mix_share": "something is mixed in",
    "min_lr": "the schedule is a cosine",
    "instructions": "dialogues are measured",
    "kept": "dialogues are measured",
    "refusal_pairs": "refusals are measured",
}


@pytest.mark.parametrize("verb", WHOLE)
def test_every_option_is_read(verb, tiny, tmp_path, monkeypatch):
    cls = config_of(verb)
    names = {field.name for field in dataclasses.fields(cls)}
    read: set[str] = set()

    def watched(self, name):
        if name in names and Path(sys._getframe(1).f_code.co_filename).name not in ALIKE:
            read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(cls, "__getattribute__", watched, raising=False)
    assert main(words_of(verb, tiny, tmp_path)) == 0
    assert names - read <= RARELY.keys()
