"""Comparisons out of the file and into it: Puna's preference format, TRL's, Label Studio's.

The first two are JSON lines that `puna reward` reads. Label Studio's is the list of tasks that it
exports and imports, for this labelling interface:

    <View>
      <Paragraphs name="dialogue" value="$dialogue" layout="dialogue" nameKey="role"
                  textKey="content"/>
      <Pairwise name="preference" toName="left,right"/>
      <Text name="left" value="$left"/> <Text name="right" value="$right"/>
      <Choices name="rating" toName="dialogue">
        <Choice value="significantly_better"/> <Choice value="better"/>
        <Choice value="slightly_better"/> <Choice value="negligibly_better"/>
      </Choices>
      <Choices name="safety" toName="dialogue">
        <Choice value="chosen_safe"/> <Choice value="both_safe"/> <Choice value="both_unsafe"/>
      </Choices>
    </View>
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.core.documents import field, parse_json, regular_file, shortened, typed
from puna.trainers.annotations.items import (
    Given,
    add_item,
    ask_batch,
    dialogue_in,
    put_answers,
)
from puna.trainers.annotations.people import person
from puna.trainers.annotations.store import Store
from puna.trainers.data.columns import Columns, ReadingComparisons
from puna.trainers.data.formats import Preference, parse_preference
from puna.trainers.data.messages import Malformed, Unusable
from puna.trainers.data.readers import Skipped, read_preferences

FORMATS = ("puna", "trl", "label-studio")
VERDICTS = """
SELECT item.id, batch, kind, messages, item.source, annotator.name AS annotator, chosen, rating,
    safety, seconds, at
FROM verdict JOIN item ON item.id = verdict.item JOIN annotator ON annotator.id = verdict.annotator
WHERE undone IS NULL AND chosen IS NOT NULL {} ORDER BY item.id, verdict.id
"""


def preferences(store: Store, batch: int | None = None) -> Iterator[dict[str, Any]]:
    """A row of the preference format for each verdict, of one batch or of all: what `puna reward`
    reads, then what else is known (nothing reads it there)."""
    for found in verdicts(store, batch):
        chosen, rejected = found["chosen"], "left" if found["chosen"] == "right" else "right"
        answers = {
            each["side"]: each
            for each in store.rows("SELECT * FROM answer WHERE item = ?", found["id"])
        }
        row: dict[str, Any] = {
            "messages": dialogue_in(found),
            "chosen": answers[chosen]["text"],
            "rejected": answers[rejected]["text"],
            "rating": found["rating"],
            "safety": found["safety"],
            "batch": found["batch"],
        }
        for name in ("model", "temperature", "version", "seed"):
            for role, side in (("chosen", chosen), ("rejected", rejected)):
                row[f"{role}_{name}"] = answers[side][name]
        row |= {
            "kind": found["kind"],
            "item": found["id"],
            "chosen_side": chosen,
            "annotator": found["annotator"],
            "seconds": found["seconds"],
            "at": found["at"],
        }
        yield {name: value for name, value in row.items() if value not in (None, "")}


def verdicts(store: Store, batch: int | None) -> list[Any]:
    if batch is None:
        return store.rows(VERDICTS.format(""))
    return store.rows(VERDICTS.format("AND batch = ?"), batch)


def as_trl(row: Mapping[str, Any]) -> dict[str, Any]:
    """A preference in TRL's conversational form with an explicit prompt."""
    rest = {name: row[name] for name in row if name not in ("messages", "chosen", "rejected")}
    answers = {
        name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")
    }
    return {"prompt": row["messages"], **answers, **rest}


def as_task(row: Mapping[str, Any]) -> dict[str, Any]:
    """A preference as a task of Label Studio with its annotation."""
    chosen = row.get("chosen_side", "left")
    rejected = "left" if chosen == "right" else "right"
    rest = {name: row[name] for name in row if name not in ("messages", "chosen", "rejected")}
    result = [
        {"from_name": "preference", "to_name": "left,right", "type": "pairwise",
         "value": {"selected": chosen}},
        *({"from_name": name, "to_name": "dialogue", "type": "choices",
           "value": {"choices": [row[name]]}} for name in ("rating", "safety") if name in row),
    ]  # fmt: skip
    data = {"dialogue": row["messages"], chosen: row["chosen"], rejected: row["rejected"], **rest}
    return {"data": data, "annotations": [{"result": result}]}


def written(store: Store, form: str, batch: int | None = None) -> str:
    """The text of an export."""
    rows = list(preferences(store, batch))
    if form == "label-studio":
        return json.dumps([as_task(row) for row in rows], ensure_ascii=False, indent=1) + "\n"
    lines = [as_trl(row) for row in rows] if form == "trl" else rows
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)


def read(
    path: Path, form: str, how: ReadingComparisons | None = None
) -> tuple[Sequence[Preference], Skipped]:
    """The comparisons of a file. Raises ValueError where it cannot be read, with file and line."""
    return read_tasks(path) if form == "label-studio" else read_preferences(path, how)


def read_tasks(path: Path) -> tuple[list[Preference], Skipped]:
    """The annotated tasks of Label Studio's JSON export, of the interface above."""
    tasks = parse_json(regular_file(path).read_bytes(), str(path), "export it from Label Studio")
    if not isinstance(tasks, list):
        raise ValueError(f"{path}: not a list of tasks; export it from Label Studio as JSON")
    found, skipped = [], Skipped()
    for number, task in enumerate(tasks, 1):
        where = f"{path}: task {number}"
        try:
            if not isinstance(task, dict):
                raise Malformed(f"it is {shortened(task)}, expected an object")
            for row in rows_of(task):
                parsed = parse_preference(row, Columns(), {})
                found.append(parsed._replace(where=where))
        except Unusable as error:
            skipped.add(str(error), where)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return found, skipped


def rows_of(task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A task's annotations as rows of the preference format."""
    data = field(task, "data", dict)
    for annotation in field(task, "annotations", list):
        said: dict[str, Any] = {}
        for each in field(typed(annotation, dict, "an annotation"), "result", list):
            each = typed(each, dict, "a result")
            value = field(each, "value", dict)
            name = field(each, "from_name", str)
            said[name] = value.get("selected") or (value.get("choices") or [None])[0]
        chosen = said.get("preference")
        if chosen not in ("left", "right"):
            raise Unusable("neither left nor right is selected")
        rejected = "left" if chosen == "right" else "right"
        row = {
            "messages": field(data, "dialogue", list),
            "chosen": field(data, chosen, str),
            "rejected": field(data, rejected, str),
            "rating": said.get("rating"),
            "safety": said.get("safety"),
        }
        names = [
            f"{role}_{what}" for role in ("chosen", "rejected") for what in ("model", "temperature")
        ]
        yield row | {name: data[name] for name in ("batch", *names) if data.get(name) is not None}


def bring_in(store: Store, rows: Sequence[Preference], name: str = "import") -> int:
    """Add comparisons with their verdicts, each once however often the file is brought in; returns
    how many were new. Which answer is left is drawn from the row; a row keeps its batch's
    number."""
    who, new = person(store, name), 0
    for row in rows:
        source = source_of(row)
        kind = "helpfulness" if row.safety is None else "safety"
        with store.writing() as db:
            batch = batch_of(store, row.batch)
            item = add_item(store, batch, kind, source, row.messages)
            if item is None:
                continue
            chosen = "left" if int(source[-1], 16) % 2 else "right"
            good = Given(row.chosen, row.chosen_model, "", row.chosen_temperature)
            bad = Given(row.rejected, row.rejected_model, "", row.rejected_temperature)
            put_answers(store, item, *((good, bad) if chosen == "left" else (bad, good)))
            db.execute(
                "INSERT INTO verdict (key, item, annotator, chosen, rating, safety, at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (source, item, who, chosen, row.rating, row.safety, time.time()),
            )
            db.execute("UPDATE item SET wanted = 0 WHERE id = ?", (item,))
            new += 1
    return new


def source_of(row: Preference) -> str:
    """What a comparison that is brought in is known by: the same for rows that say the same."""
    mark = json.dumps(row._replace(where=""), ensure_ascii=False)
    return f"import:{hashlib.sha256(mark.encode()).hexdigest()[:32]}"


def batch_of(store: Store, number: int | None) -> int:
    """The batch that a row which is brought in belongs to: that of its number, whoever asked for
    it, or one of all rows without a number."""
    if number is None:
        return ask_batch(store, "import", 0)
    with store.writing() as db:
        db.execute(
            "INSERT OR IGNORE INTO batch (number, source, expected) VALUES (?, ?, 0)",
            (number, f"import:{number}"),
        )
    return number
