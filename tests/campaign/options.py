"""Every option of every verb with values that cannot be, alone and two at a time, on a tiny run
that works: each is refused in one sentence and status 1 or 2 within ten seconds, or is in TAKEN.

    python tests/campaign/options.py --seconds 600 --seed 3
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

HANG_SECONDS = 10
FAST = "--device cpu --batch 4 --save-every 50 --lr 1e-3"
RUNS = {
    "pretrain": "--data {0}/text.jsonl --tokenizer {0}/tokenizer.model --context 48 --steps 2 "
    f"{FAST}",
    "sft": f"--model {{0}}/lm --data {{0}}/dialogues.jsonl --epochs 1 {FAST}",
    "reward": f"--model {{0}}/chat --data {{0}}/preferences.jsonl {FAST}",
    "gatt": f"--model {{0}}/chat --dialogues {{0}}/ghosts.jsonl --max-new-tokens 12 {FAST}",
    "rejection": "--policy {0}/chat --helpfulness {0}/helpfulness --safety {0}/safety "
    f"--prompts {{0}}/prompts.jsonl --samples 2 --max-new-tokens 12 --epochs 1 {FAST}",
    "distill": "--policy {0}/chat --safety {0}/safety --prompts {0}/prompts.jsonl "
    f"--max-new-tokens 12 {FAST}",
    "ppo": "--policy {0}/chat --helpfulness {0}/helpfulness --safety {0}/safety --iterations 2 "
    f"--prompts {{0}}/prompts.jsonl --minibatch 2 --max-new-tokens 8 {FAST}",
    "rlhf": "--model {0}/chat --prompts {0}/prompts.jsonl --helpfulness-prompts {0}/prompts.jsonl "
    "--safety-prompts {0}/prompts.jsonl --versions 1 --helpfulness-pairs 4 --safety-pairs 4 "
    "--max-new-tokens 8 --device cpu",
    "evaluate": "--model {0}/helpfulness --data {0}/preferences.jsonl --device cpu",
    "evaluate chat": "--model {0}/chat --against {0}/lm --prompts {0}/prompts.jsonl "
    "--judge {0}/helpfulness --safety {0}/safety --curves {0}/prompts.jsonl --temperatures 1.0 "
    "--samples 2 --max-new-tokens 8 --device cpu",
    "score": "--model {0}/helpfulness --safety {0}/safety --data {0}/dialogues.jsonl --device cpu",
    "sample": "--policy {0}/chat --helpfulness {0}/helpfulness --safety {0}/safety "
    "--prompts {0}/prompts.jsonl --samples 2 --max-new-tokens 12 --device cpu",
    "generate": "--model {0}/chat --prompt red --max-new-tokens 4 --device cpu",
    "chat": "--model {0}/chat --device cpu",
    "convert": "--source {0}/lm --target {1}/converted",
    "tokenizer train": "--data {0}/text.jsonl --output {1}/t.model --vocab-size 300",
    "tokenizer encode": "--tokenizer {0}/tokenizer.model --text red",
    "tokenizer inspect": "--tokenizer {0}/tokenizer.model",
}
WITH_OUT = (
    "pretrain", "sft", "reward", "gatt", "rejection", "distill", "ppo", "rlhf", "sample",
    "evaluate chat",
)  # fmt: skip

NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e30",
    "9" * 30,
    "",
    "x",
    "1e400",
    "--",
    "0x10",
    "1,000",
    "True",
)
CHOICES = ("", "x", "None", "NEWEST", "0")
FILES = ("{1}/absent", "", "{1}", "/dev/null", "{1}/empty", "{1}/zeros", "{1}/pipe", "\x1b[2J")

OUTPUTS = ("out", "output", "target")

# Odd values that are taken, and why: (option, value) -> reason.
TAKEN = {
    **{(name, "{1}/absent"): "it is made" for name in OUTPUTS},
    **{
        (option, f"{{1}}/{name}"): "a file is replaced"
        for option in ("out", "output")  # of evaluate and of the tokenizer; a run's is refused
        for name in ("empty", "zeros")
    },
    **{(name, "\x1b[2J"): "files may be called so; it is shown escaped" for name in OUTPUTS},
}


class Case(NamedTuple):
    verb: str
    options: tuple[tuple[str, str], ...]


def config_of(verb: str) -> type:
    from puna.cli.main import VERBS

    return getattr(importlib.import_module(VERBS[verb].module), VERBS[verb].config)


def odd_values(hint: Any) -> tuple[str, ...]:
    """Values that no option of this type can have."""
    text = str(hint)
    if "Literal" in text:
        return CHOICES
    if "Path" in text:
        return FILES
    if "int" in text or "float" in text:
        return NUMBERS
    return ()


def options_of(verb: str) -> list[tuple[str, str]]:
    """(flag, odd value) of a verb, tables of columns left out."""
    cls = config_of(verb)
    hints = typing.get_type_hints(cls)
    return [
        (field.name, value)
        for field in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(hints[field.name]) and "dict" not in str(hints[field.name])
        for value in odd_values(hints[field.name])
    ]


def cases(rng: random.Random) -> Iterator[Case]:
    """Each option with each value once, then two at a time without end."""
    singles = [Case(verb, (option,)) for verb in RUNS for option in options_of(verb)]
    rng.shuffle(singles)
    yield from singles
    while True:
        one, other = rng.choice(singles), rng.choice(singles)
        if one.verb == other.verb and one.options[0][0] != other.options[0][0]:
            yield Case(one.verb, one.options + other.options)


def command_line(case: Case, tiny: Path, work: Path) -> list[str]:
    words = RUNS[case.verb].format(tiny, work).split()
    if case.verb in WITH_OUT:
        words += ["--out", str(work / "run")]
    for name, value in case.options:
        words += [f"--{name.replace('_', '-')}", value.format(tiny, work)]
    return [*case.verb.split(), *words]


def run(case: Case, tiny: Path, work: Path, said: Path) -> None:
    """In a process of its own: the verb's status and what it wrote to stderr, into `said`."""
    from puna.cli.main import main

    os.chdir(work)
    (work / "empty").write_bytes(b"")
    (work / "zeros").write_bytes(bytes(4096))
    os.mkfifo(work / "pipe")
    errors, status = io.StringIO(), "no status"
    sys.stdin = io.StringIO("")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            status = str(main(command_line(case, tiny, work)))
        except SystemExit as stop:
            status = str(stop.code)
        except BaseException:
            traceback.print_exc()
    said.write_text(f"{status}\n{errors.getvalue()}")


def judged(case: Case, text: str | None) -> str | None:
    """What is wrong with how a case ended; None where nothing is."""
    if text is None:
        return "hang"
    status, _, errors = text.partition("\n")
    if "Traceback" in errors or "mistake in Puna" in errors:
        return f"traceback: {errors[-600:]}"
    if "\x1b" in errors and status == "1":
        return "control sequence sent"
    if status == "0":
        if all(reason(option) is not None for option in case.options):
            return None
        return "taken in silence"
    if status == "2":  # the parser's own box
        return None
    lines = [line for line in errors.splitlines() if line.startswith("puna ")]
    if status != "1" or len(lines) != 1:
        return f"status {status}, {len(lines)} sentences: {errors[-300:]}"
    return None


def reason(option: tuple[str, str]) -> str | None:
    return TAKEN.get(option)


def one(case: Case, tiny: Path, root: Path) -> str | None:
    work = Path(tempfile.mkdtemp(dir=root))
    said = root / "said"
    said.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=run, args=(case, tiny, work, said))
    process.start()
    process.join(HANG_SECONDS)
    hung = process.is_alive()
    process.kill()
    process.join()
    shutil.rmtree(work, ignore_errors=True)
    text = said.read_text() if said.exists() and not hung else None
    if not hung and text is None:
        return f"died with {process.exitcode}"
    return judged(case, text)


def campaign(seconds: float, seed: int, most: int | None = None) -> list[tuple[Case, str]]:
    """What was found in `seconds`, or in `most` cases."""
    import torch
    from tiny import make_tiny

    import puna.cli.chat
    import puna.cli.generate
    import puna.trainers.rlhf  # noqa: F401

    torch.set_num_threads(1)
    began, counts, found = time.monotonic(), Counter[str](), []
    root = Path(tempfile.mkdtemp(prefix="options-"))
    tiny = root / "tiny"
    tiny.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        make_tiny(tiny)
    for number, case in enumerate(cases(random.Random(seed))):
        if time.monotonic() - began > seconds or number == most:
            break
        wrong = one(case, tiny, root)
        counts["wrong" if wrong else "right"] += 1
        if wrong:
            found.append((case, wrong))
            print(f"{case}: {wrong}", flush=True)
    print(f"{sum(counts.values())} cases in {time.monotonic() - began:.0f} s: {dict(counts)}")
    shutil.rmtree(root)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    return 1 if campaign(given.seconds, given.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
