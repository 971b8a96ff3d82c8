"""A wrong --out: a run of another stage, somebody's files with the names of ours.

Run: python -m pytest tests/test_other_folders.py -q
"""

import json
import os

import pytest
from test_hands import WORDS, words_of

from puna.cli.main import main
from puna.trainers import pretrain
from puna.trainers.train import lock

STAGES = ("sft", "reward", "rejection", "ppo", "gatt", "distill", "rlhf", "pretrain", "sample")
SAVING = ("--save-every", "1")


def snapshot(folder):
    return {
        str(path): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != lock.LOCK
    }


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    words = words_of("sft", tiny, folder)
    assert main([*(each for each in words), *SAVING]) == 0
    return folder


@pytest.mark.parametrize("amend", [(), ("--amend",)], ids=["", "amend"])
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_run_of_another_stage_is_not_taken_over(stage, amend, finished, tiny, capsys):
    if amend and stage == "sample":
        pytest.skip("it cannot be amended")
    before = snapshot(finished / "run")
    assert main([*words_of(stage, tiny, finished), *amend]) == 1
    said = capsys.readouterr().err
    assert "run is a run of SFT, not of " in said and "another --out" in said
    assert snapshot(finished / "run") == before
    assert main([*words_of("sft", tiny, finished), *SAVING]) == 0


@pytest.mark.parametrize("text", ['title = "my site"\n', "no TOML at all [\n"])
@pytest.mark.parametrize("stage", STAGES)
def test_somebodys_config_is_not_a_run(stage, text, tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(text)
    assert main(words_of(stage, tiny, tmp_path)) == 1
    assert "holds no run (config.toml)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]
    assert (tmp_path / "run" / "config.toml").read_text() == text


def test_a_start_that_was_killed_between_its_records_goes_on(tiny, tmp_path):
    words = words_of("sft", tiny, tmp_path)
    assert main(words) == 0
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "inputs.json").write_bytes((tmp_path / "run/inputs.json").read_bytes())
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "again")
    assert main(words) == 0


@pytest.mark.parametrize("linked", [False, True])
def test_somebodys_lock_is_left_alone(linked, tiny, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    theirs = tmp_path / ("theirs" if linked else "run/.lock")
    theirs.write_text("precious")
    if linked:
        (tmp_path / "run" / ".lock").symlink_to("../theirs")
    assert main(words_of("sft", tiny, tmp_path)) == 1
    said = capsys.readouterr().err
    assert ".lock is a link" in said if linked else "no lock of a run" in said
    assert theirs.read_text() == "precious"


def test_a_lock_that_was_removed_is_nobodys(tmp_path, monkeypatch):
    """Between opening and locking it another start may be refused, and remove it."""
    left, flock = [True], lock.fcntl.flock

    def late(descriptor, how):
        if left.pop() if left else False:
            os.unlink(tmp_path / lock.LOCK)
        flock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match="being written to"), lock.locked(tmp_path):
            pass


def test_an_amended_model_is_looked_at(tiny, tmp_path, capsys):
    assert main([*words_of("sft", tiny, tmp_path), *SAVING]) == 0
    before = (tmp_path / "run" / "inputs.json").read_bytes()
    words = words_of("sft", tiny, tmp_path)
    words[words.index("--model") + 1] = str(tiny / "helpfulness")
    words[words.index("--epochs") + 1] = "2"
    assert main([*words, *SAVING, "--amend"]) == 1
    assert "score head" in capsys.readouterr().err
    assert (tmp_path / "run" / "inputs.json").read_bytes() == before


def test_a_text_may_be_encoded_before_options_are_right(tiny, tmp_path, monkeypatch):
    """What fits no row is said before; and options may change until there is a step."""
    words = words_of("pretrain", tiny, tmp_path)
    assert main([*words, "--row-tokens", "100"]) == 1
    assert not (tmp_path / "run").exists()

    def refuses(*_):
        raise ValueError("too few tokens")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "split_corpus", refuses)
        assert main(words) == 1
    assert (tmp_path / "run" / "corpus").exists()
    words[words.index("--context") + 1] = "32"
    assert main(words) == 0


def test_every_stage_is_here():
    assert set(STAGES) < WORDS.keys()
