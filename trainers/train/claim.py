"""Whose folder it is: a run is continued with what it began with, and by one process at a time.

config.toml        the resolved configuration, itself a recipe
inputs.json        digests of all that it reads
environment.json   stage, versions, machine, commit, of the newest start
amendments.jsonl   what `--amend` changed, and after which step
finished.json      written when all is done; nothing else says so
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from puna.core import parallel, ranks
from puna.core.checkpoint.atomic import make_folder, remove_empty, write_text
from puna.core.documents import json_rows
from puna.core.errors import UserError
from puna.trainers.train.advice import advice, commanded
from puna.trainers.train.config import to_toml
from puna.trainers.train.environment import environment
from puna.trainers.train.inputs import Given, Inputs, differences, inputs_of
from puna.trainers.train.kinds import Kind, kinds_of
from puna.trainers.train.lock import LOCK, locked
from puna.trainers.train.notice import notice
from puna.trainers.train.precision import computing
from puna.trainers.train.ranges import Options, enforce
from puna.trainers.train.recipes import read_toml

CONFIG, INPUTS, ENVIRONMENT, AMENDMENTS, FINISHED = (
    "config.toml", "inputs.json", "environment.json", "amendments.jsonl", "finished.json",
)  # fmt: skip
RECORDS = {CONFIG, INPUTS, ENVIRONMENT, AMENDMENTS}
PREPARED = "corpus"  # made before the first step; what it is of, it checks itself
WAIT = 1800.0  # seconds, of what has no option for it
MISTAKES = (ValueError, OSError, UserError)  # what is said in a sentence
ASKED_EACH_TIME = ("amend", "resume")  # of this start, not of the run

Tables = Mapping[str, type]
"""Field that is a table -> the configuration whose options stand in it"""


@contextmanager
def owned(
    config: Any,
    *,
    tables: Tables | None = None,
    given: Given | None = None,
    step: Callable[[Path], int] = lambda path: 0,
) -> Iterator[frozenset[str]]:
    """Hold `config.out` as the folder of this configuration, alone, until the block ends, in which
    products are the configuration's; gives the names of the options that this start has amended.

    `given` came from Python and not from a file; `step` says after which step a run in a folder
    would be amended, or raises ValueError.
    Collective. Raises ValueError, on every rank, where another process has the folder; where it is
    not empty and holds no run; where what decides the run's numbers is not what it began with, or
    not the same on every rank.
    """
    ranks.init()  # where a stage is called from Python, nobody has
    if isinstance(config, Options):
        enforce(config)
    parallel.wait_at_most(getattr(config, "timeout", WAIT))
    inputs = inputs_of(config, given)
    same_on_every_rank(config, inputs)
    with ExitStack() as stack:
        # A notebook may have turned gradients off for all that follows.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(commanded(config))

        def take() -> list[str]:
            refuse_strangers(config.out)
            made = make_folder(config.out)
            there = set(config.out.iterdir())
            stack.enter_context(locked(config.out))
            stack.enter_context(gone_again(config.out, made, there))
            stack.enter_context(taken_back(config.out))
            return claim(config, inputs, tables or {}, step)

        amended = frozenset(parallel.on_main(take))
        stack.enter_context(computing(config))
        try:
            yield amended
        except KeyboardInterrupt as error:  # where nobody was asked whether to stop
            raise KeyboardInterrupt(f"the same command continues {config.out}") from error


@contextmanager
def gone_again(path: Path, made: list[Path], there: set[Path]) -> Iterator[None]:
    """Where the block ends over a mistake before a first start has done anything, what it put into
    `path` beside what was `there` goes again, and the folders that were `made` for it: a typo
    leaves nothing to clear up."""
    try:
        yield
    except MISTAKES:
        with suppress(OSError):  # there is something to say already
            if path / CONFIG not in there and is_untouched(path, prepared=False):
                for each in {*path.iterdir()} - there:
                    if each.name in {*RECORDS, LOCK}:
                        each.unlink()
                    elif is_empty(each):
                        each.rmdir()
                remove_empty(made)
        raise


@contextmanager
def taken_back(path: Path) -> Iterator[None]:
    """Where the block ends over a mistake before it has done anything, the records of the run in
    `path` are again what they were: an amendment with a typo would refuse the former command."""
    if not (path / CONFIG).exists():
        yield  # a new run: its options may change as long as it has done nothing
        return
    records = {
        name: (path / name).read_bytes() if (path / name).exists() else None
        for name in (*RECORDS, FINISHED)
    }
    before = contents(path)
    try:
        yield
    except MISTAKES:
        amended = amendments(path) > (records[AMENDMENTS] or b"").count(b"\n")
        if contents(path) == before:
            for name, data in records.items():
                if data is None:
                    (path / name).unlink(missing_ok=True)
                else:
                    write_text(path / name, data.decode())
            if amended:
                notice(f"{path}: nothing was done under the amendment; it is taken back")
        raise


def contents(path: Path) -> dict[str, tuple[int, int]]:
    """Bytes and time of every file of a run that is no record of ours."""
    return {
        str(file.relative_to(path)): (file.stat().st_size, file.stat().st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file() and file.name not in {*RECORDS, FINISHED} and file.name[0] != "."
    }


def refuse_strangers(path: Path) -> None:
    """ValueError where `path` holds something, but no run."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give another --out")
    if not path.exists() or holds_run(path):
        return
    there = sorted(each.name for each in path.iterdir() if not each.name.startswith("."))
    if there:
        raise ValueError(
            f"{path} is not empty and holds no run ({', '.join(there[:3])}); give another --out"
        )


def holds_run(path: Path) -> bool:
    """Whether `claim` has written here, or was killed while it did; a config.toml alone may be
    anybody's."""
    if (path / CONFIG).exists():
        return (path / INPUTS).exists()
    try:
        return bool(read_inputs(path)) and is_untouched(path)
    except ValueError:
        return False


def claim(config: Any, inputs: Inputs, tables: Tables, step: Callable[[Path], int]) -> list[str]:
    """Write what is asked for into the folder, or hold it against what was asked for there; returns
    the names of what is amended."""
    path = config.out
    amended: list[str] = []
    replaced: list[str] = []
    if (path / CONFIG).exists() and not is_untouched(path):
        refuse_other_stage(config)
        free, amended, fixed = changes(read_toml(path / CONFIG), config, tables)
        replaced = differences(read_inputs(path), inputs)
        refuse(config, fixed, [*amended, *replaced])
        if free:
            notice(f"{path} goes on with {', '.join(free)}")
        if amended or replaced:
            note_amendment(path, step(path), [*amended, *replaced])
    here = {"stage": stage_of(config), **environment()}
    write_text(path / INPUTS, json.dumps(inputs, indent=2) + "\n")
    write_text(path / CONFIG, to_toml(config, without=ASKED_EACH_TIME))
    write_text(path / ENVIRONMENT, json.dumps(here, indent=2) + "\n")
    return [name_in(phrase) for phrase in [*amended, *replaced]]


def refuse_other_stage(config: Any) -> None:
    """ValueError where the folder is a run of another stage: `--amend` would take it over."""
    try:
        before = json.loads((config.out / ENVIRONMENT).read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, TypeError, KeyError):
        return  # of a version that did not say it
    if before != stage_of(config):
        raise ValueError(
            f"{config.out} is a run of {before!s:.80}, not of {stage_of(config)}; give another "
            "--out"
        )


def stage_of(config: Any) -> str:
    """SFTConfig -> SFT"""
    return type(config).__name__.removesuffix("Config")


def refuse(config: Any, fixed: list[str], amended: list[str]) -> None:
    """ValueError where something cannot change, or was not asked to."""
    if fixed:
        raise ValueError(
            f"{config.out} holds a run with {'; '.join(fixed)}, which cannot change on the way; "
            "give another --out"
        )
    if amended and not getattr(config, "amend", False):
        way = ""
        if hasattr(config, "amend"):
            way = advice("amend", "add --amend to change them from here on, ", "")
        raise ValueError(
            f"{config.out} holds a run on other terms ({'; '.join(amended)}); go on with the old "
            f"ones, {way}or give another --out"
        )


def is_untouched(path: Path, prepared: bool = True) -> bool:
    """Whether a run's folder holds nothing but what `claim` and `Run` put there, and what was
    `prepared`: a run that ended over a mistake in its options can be started again with the right
    ones."""
    names = {*RECORDS, PREPARED} if prepared else RECORDS
    return all(
        each.name in names or each.name.startswith(".") or is_empty(each) for each in path.iterdir()
    )


def is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def changes(
    before: Mapping[str, Any], config: Any, tables: Tables
) -> tuple[list[str], list[str], list[str]]:
    """What differs from the recorded options, as phrases: (free, to be amended, fixed)."""
    # A table of an older version lacks what has been added to it since, as the whole may.
    usual = flat(defaults(type(config)))
    old = renamed(usual | flat(before), hasattr(config, "parallel"), hasattr(config, "eval_every"))
    new = usual | flat(plain(config))
    found: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            phrase = f"{key} {said(new.get(key))} where it was {said(old.get(key))}"
            found[kind_of(key, type(config), tables)].append(phrase)
    return found[Kind.FREE], found[Kind.AMENDED], found[Kind.FIXED]


def renamed(options: dict[str, Any], has_layout: bool, held_out: bool) -> dict[str, Any]:
    """Options that a run recorded before there was a [parallel] table, as they are called now; what
    trains nothing has no such table."""
    found = {}
    for key, value in options.items():
        table, dot, name = key.rpartition(".")
        if name == "activation_checkpointing":
            name, value = "parallel.checkpointing", "full" if value else "none"
        elif name in ("replicate", "compile") and not key.endswith(f"parallel.{name}"):
            if not has_layout:
                continue
            name = f"parallel.{name}"
        elif key == "eval_every" and not held_out:
            continue  # it once stood where nothing is held out
        found[table + dot + name] = value
    return found


def kind_of(key: str, cls: type, tables: Tables) -> Kind:
    """Of an option, or of one in a table of another configuration's options: what is fixed in a
    run of its own can change for the runs that a loop has not begun."""
    table, _, name = key.partition(".")
    if name and table in tables:
        kind = kinds_of(tables[table]).get(name, Kind.AMENDED)
        return Kind.AMENDED if kind is Kind.FIXED else kind
    return kinds_of(cls).get(table, Kind.AMENDED)


def said(value: Any) -> str:
    return "left out" if value is None else str(value)


def plain(config: Any) -> dict[str, Any]:
    """The options as they come back from config.toml."""
    values = dataclasses.asdict(config)
    return {
        name: "None" if value is None else in_toml(value)
        for name, value in values.items()
        if name not in ASKED_EACH_TIME
    }


def in_toml(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: in_toml(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [in_toml(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def defaults(cls: type) -> dict[str, Any]:
    """The values of options that a recorded configuration, of an older version, may not have."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = in_toml(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            found[field.name] = in_toml(value)
    return {name: value for name, value in found.items() if value is not None}


def flat(values: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """{"columns.text": ...} of {"columns": {"text": ...}}; "None" is what TOML has for None."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{table}{key}.")
        elif value != "None":
            found[f"{table}{key}"] = value
    return found


def read_inputs(path: Path) -> Inputs:
    """What the run began with; ValueError where inputs.json is no longer readable."""
    try:
        found = json.loads((path / INPUTS).read_text(encoding="utf-8"))
        if all(isinstance(f["sha256"], str) for files in found.values() for f in files):
            return found
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        pass
    raise ValueError(f"{path / INPUTS} is missing or damaged; give another --out")


def note_amendment(path: Path, step: int, what: list[str]) -> None:
    file = path / AMENDMENTS
    rows = file.read_text(encoding="utf-8") if file.exists() else ""
    row = {"after_step": step, "at": time.strftime("%Y-%m-%d %H:%M:%S"), "changed": what}
    write_text(file, rows + json.dumps(row, ensure_ascii=False) + "\n")
    notice(f"{path} is amended after step {step}: {'; '.join(what)}")


def is_finished(path: Path) -> bool:
    """Whether the run in `path` said that all is done."""
    return (path / FINISHED).exists()


def amendments(path: Path) -> int:
    """How often the run in `path` was amended."""
    file = path / AMENDMENTS
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0


def amended_names(path: Path) -> list[list[str]]:
    """The options that each amendment of the run in `path` changed."""
    file = path / AMENDMENTS
    rows = [row for _, row in json_rows(file)] if file.exists() else []
    return [[name_in(phrase) for phrase in row["changed"]] for row in rows]


def name_in(phrase: str) -> str:
    """lr, of "lr 0.1 where it was 0.2"."""
    return phrase.split(" ")[0].rstrip(":")


def amended_since_finished(path: Path) -> bool:
    """Whether a finished run was given more to do; ValueError where finished.json is damaged."""
    try:
        return amendments(path) > int(json.loads((path / FINISHED).read_text())["amendments"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path / FINISHED} is damaged; remove it to go on") from None


def same_on_every_rank(config: Any, inputs: Inputs) -> None:
    """ValueError, on every rank, where one was started with other options or reads other files."""
    cls: type = type(config)
    options = {
        key: str(value)
        for key, value in flat(plain(config)).items()
        if kind_of(key, cls, {}) is not Kind.FILES
    }
    files = {name: [each["sha256"] for each in found] for name, found in inputs.items()}
    parallel.same({"option": options, "contents of": files})
