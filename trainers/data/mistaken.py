"""What was named as data and is none: said in true words, with the way out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.core.documents import as_name, count_of

OF_MODELS = {
    "config.json", "generation_config.json", "params.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "model.safetensors.index.json",
}  # fmt: skip
TABLES = (".csv", ".tsv", ".xlsx", ".arrow")
OF_RUNS = {"inputs.json", "environment.json", "written.json", "finished.json"}
TALKS = ("messages", "conversations", "turns")  # columns whose objects are no rows
WIDE = (b"\xff\xfe", b"\xfe\xff")  # UTF-16's byte order marks


def check_name(file: Path, named: Path) -> None:
    """ValueError where a file, found at the `named` path, is a model's, a run's or of a format
    that is not read."""
    holds = f"{named} holds {file}, which" if file != named else str(file)
    if file.name in OF_MODELS:
        raise ValueError(
            f"{holds} belongs to a model and is no data; name files of rows, and the model's "
            "folder with --model"
        )
    if file.suffix in TABLES:
        raise ValueError(f"{file} is a table; save it as .jsonl or .parquet")
    if file.name in OF_RUNS:
        raise ValueError(
            f"{holds} belongs to a run and is no data; name the run's file that is meant, such as "
            f"{file.parent / 'samples.jsonl'}"
        )


def check_beginning(name: str, begin: bytes, *, is_text: bool) -> None:
    """ValueError where the first bytes of a file, unpacked, are not those of rows or a text."""
    if begin.startswith(WIDE):
        raise ValueError(f"{name} is UTF-16, expected UTF-8 text; save it so")
    if b"\0" in begin and not is_text:  # JSON writes it as an escape, a text may have one
        raise ValueError(
            f"{name} is binary and no rows, which come as .jsonl, .json, .parquet or .txt; a model "
            "or a tokenizer is named with --model"
        )


def rows_inside(row: Mapping[str, Any]) -> str:
    """A hint where a row of unknown columns has a list of objects in one of them: the rows are
    perhaps these."""
    for name, value in row.items():
        if name in TALKS:
            continue
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            return (
                f"; if the rows are in '{as_name(name)}' ({count_of(len(value), 'object')}), save "
                "that list alone"
            )
    return ""
