"""What people type the first time: each is done, or told in a sentence with the way out.
Run: python -m pytest tests/test_first_tries.py -q"""

import importlib
import inspect
import json
import re
import shutil

import pytest

from puna.cli.main import SHARED, VERBS, main


@pytest.fixture
def tried(tiny, tmp_path, capsys, monkeypatch):
    """Call with a line ({0}: the tiny folder, {1}: one of the test's own): (status, stdout,
    stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(line.format(tiny, tmp_path).split())
        return status, *capsys.readouterr()

    return run


MISPLACED = {
    "chat {0}/chat": "--model {0}/chat",
    "generate {0}/chat --prompt x": "--model {0}/chat",
    "sft {0}/dialogues.jsonl --model {0}/lm --out {1}/o": "--data {0}/dialogues.jsonl",
    "ppo {0}/chat": "--policy {0}/chat",
    "score {0}/dialogues.jsonl --model {0}/safety": "--data {0}/dialogues.jsonl",
    "tokenizer train {0}/text.jsonl --output {1}/t.model": "--data {0}/text.jsonl",
    "sample {0}/prompts.jsonl --policy {0}/chat": "--prompts {0}/prompts.jsonl",
    "tokenizer inspect {0}/tokenizer.model": "--data {0}/tokenizer.model",
}


@pytest.mark.parametrize("line", MISPLACED)
def test_a_file_without_its_option_is_no_recipe(tried, tiny, tmp_path, line):
    status, out, error = tried(line)
    name = line.split()[1 + line.startswith("tokenizer")].format(tiny)
    assert (status, out) == (1, "")
    option = MISPLACED[line].format(tiny, tmp_path)
    assert f"{name} is no recipe, which alone is given without an option's name" in error
    assert error.endswith(f"; give it as {option}\n")


TOLD = {
    "help": "",
    "help sft": "",
    "plan 7b": "7b is no stage's recipe: its name begins with none of pretrain, .* 7b/sft.toml",
    "plan reward.toml": r"no such file, and Puna ships reward_\w+.toml, reward_\w+.toml",
    "plan sft.toml --model 7c": "7c is neither a size",
    "tokenizer decode": "no verb 'tokenizer decode'; there is tokenizer train",
    "tokenizer inspect --tokenizer {0}/chat": "is a folder, .*; give .*chat/tokenizer.model",
    "score --model {0}/safety --prompt red": "--prompt and --answer go together",
    "score --model {0}/safety --answer red": "--prompt and --answer go together",
    "score --model {0}/safety --data {0}/dialogues.jsonl --safety-threshold 0.3": "--safety",
    "evaluate chat --model {0}/chat --prompts {0}/prompts.jsonl --judge {0}/safety --samples 3 "
    "--out {1}/e": "samples and temperatures are of curves",
    "evaluate chat --model {0}/chat --prompts {0}/prompts.jsonl --judge {0}/safety "
    "--safety-threshold 0.3 --out {1}/e": "safety_threshold is of safety; name that model",
    "generate --model {0}/chat --prompts {0}/prompts.jsonl --out {1}/o.jsonl":
        r"expected 'prompt' or 'text' \(with --chat also 'messages'\)[^{]*\n$",
    "distill --policy {0}/chat --safety {0}/safety --prompts {0}/prompts.jsonl --preprompts "
    "{0}/dialogues.jsonl --max-new-tokens 9 --out {1}/d": r"expected 'preprompt'; [^{]*recipe\n$",
    "convert {0}/chat {1}/x.bin --dtype bf16": "a llama2.c .bin always has fp32: leave dtype out",
    "convert {0}/chat {1}/x.bin --to folder": "x.bin is called as a file, and a folder is asked",
    "convert {0}/chat {1}/x --to gguf": "such a file is known by its ending: call it x.gguf",
    "convert {0}/chat {1}/x.gguf --to bin": "call it x.gguf.bin",
    "rejection --policy {0}/chat --selected {0}/prompts.jsonl --out {1}/r":
        "lacks .*; name what `puna sample` or `puna rejection` wrote with reward models",
    "distill --policy {0}/chat --safety {0}/chat --prompts {0}/prompts.jsonl --out {1}/d":
        "holds an lm head and no score head",
}  # fmt: skip


@pytest.mark.parametrize("line", TOLD)
def test_a_sentence_with_the_way_out(tried, line):
    if line.startswith("help"):
        if line == "help":
            assert tried(line)[:2] == tried("--help")[:2]
            return
        with pytest.raises(SystemExit) as end:
            tried(line)
        assert end.value.code == 0
        return
    status, _, error = tried(line)
    assert status in (1, 2) and error.count("\n") == 1
    assert re.search(TOLD[line], error), error


WRITING = {
    "score --model {0}/safety --data {0}/dialogues.jsonl --out {1}/o": "--out",
    "evaluate --model {0}/safety --data {0}/preferences.jsonl --out {1}/o": "--out",
    "tokenizer train --data {0}/text.jsonl --vocab-size 300 --output {1}/o": "--output",
    "tokenizer encode --tokenizer {0}/tokenizer.model --data {0}/text.jsonl --output {1}/o.npy":
        "--output",
    "annotate export --annotations {1}/c.db --out {1}/o": "--out",
    "generate --model {0}/chat --prompts {0}/text.jsonl --out {1}/o": "--out",
}  # fmt: skip


@pytest.mark.parametrize("line", WRITING)
def test_a_file_that_is_there_is_not_replaced(tried, tiny, tmp_path, line):
    """Someone else's rows, or the tokenizer of a model: a name is soon typed by mistake."""
    assert tried("annotate import --annotations {1}/c.db --data {0}/preferences.jsonl")[0] == 0
    file = tmp_path / line.split()[-1].format(tiny, tmp_path)
    file.write_text("mine")
    status, _, error = tried(line)
    assert status == 1 and f"{file} is there already; give another {WRITING[line]}" in error
    assert file.read_text() == "mine"
    file.unlink()
    assert tried(line)[0] == 0 and file.exists()


def test_scores_of_before_go(tried, tiny, tmp_path):
    """They were once shown as those of today, or ended in a KeyError."""
    both = "score --model {0}/helpfulness --safety {0}/safety --data {0}/dialogues.jsonl --out {1}/"
    assert tried(f"{both}one.jsonl")[0] == 0
    status, out, _ = tried("score --model {0}/safety --data {1}/one.jsonl --out {1}/two.jsonl")
    assert status == 0 and "helpfulness" not in out and "Eq. 4" not in out
    one, two = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("one.jsonl", "two.jsonl")
    )
    assert set(one[0]) - set(two[0]) == {"scores", "sigmoids", "branch"}
    assert [row["score"] for row in two] == [row["scores"]["safety"] for row in one]
    drawn = "sample --policy {0}/chat --helpfulness {0}/helpfulness --prompts {0}/prompts.jsonl "
    assert tried(drawn + "--samples 2 --max-new-tokens 9 --out {1}/drawn")[0] == 0
    assert tried("score --model {0}/safety --data {1}/drawn/selected.jsonl")[0] == 0


@pytest.mark.parametrize("line", ["sft --model {0}/lm --batch 4", "reward --model {0}/chat"])
def test_held_out_rows_that_are_learned_are_counted(tried, tiny, tmp_path, line):
    name = {"sft": "dialogues", "reward": "preferences"}[line.split()[0]]
    rows = (tiny / f"{name}.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "learned.jsonl").write_text("".join(rows[:40]))
    (tmp_path / "held.jsonl").write_text("".join(rows[37:]))
    said = "among those that are learned: "
    line += " --epochs 1 --data {1}/learned.jsonl --eval-data {1}/"
    both = len({row for row in rows[:40]} & {*rows[37:]})
    assert f"{said}{both} of 11 held-out rows" in tried(f"{line}held.jsonl --out {{1}}/one")[1]
    (tmp_path / "other.jsonl").write_text("".join(row for row in rows[40:] if row not in rows[:40]))
    assert said not in tried(f"{line}other.jsonl --out {{1}}/two")[1]


@pytest.mark.parametrize(
    ("name", "kind", "shown"),
    [("ghosts", "instructed", "instruction"), ("told", "preprompts", "category")],
)
@pytest.mark.parametrize("model", ["", " --model {0}/chat"])
def test_data_knows_every_file_that_a_verb_reads(tried, tiny, tmp_path, name, kind, shown, model):
    shutil.copy(tiny / "ghosts.jsonl", tmp_path)
    (tmp_path / "told.jsonl").write_text('{"preprompt": "be kind", "category": "harm"}\n')
    status, out, _ = tried(f"data {{1}}/{name}.jsonl{model}")
    assert status == 0 and re.search(rf"read as +{kind}: Puna's own layout", out)
    assert re.search(rf"│ {shown} +│", out) and "not used" not in out
    assert tried(f"data {{1}}/{name}.jsonl --kind {kind}")[1]


def test_what_several_processes_do_not_share_is_refused_once(tried, monkeypatch):
    """Each would do all of it, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in sorted(VERBS.keys() - SHARED):
        monkeypatch.setenv("RANK", "0")
        said = f"puna {verb}: this is work for one process; start it without torchrun"
        status, _, error = tried(verb)
        assert status == 1 and error.startswith(said)
        monkeypatch.setenv("RANK", "1")
        assert tried(verb) == (1, "", "")


def test_every_module_of_the_trainers_runs_by_its_name(tiny):
    """`python -m puna.trainers.evaluate ...` once did nothing, with status 0."""
    for name, verb in VERBS.items():
        if verb.module.startswith("puna.trainers."):
            module = importlib.import_module(verb.module)
            source = inspect.getsource(module)
            assert source.endswith('if __name__ == "__main__":\n    sys.exit(main())\n'), name
            assert f'command("python -m {verb.module}", {verb.config}, run)' in source, name
