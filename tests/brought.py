"""Rows as people bring them, for the tests of reading."""

import json
from pathlib import Path

Q, GOOD, BAD = "What does the cat do?", "The cat sees the dog.", "No."
USER = {"role": "user", "content": Q}
GIVEN = {"role": "assistant", "content": GOOD}
WORSE = {"role": "assistant", "content": BAD}
ROWS = [{"prompt": f"{Q} {n}", "response": GOOD} for n in range(5)]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}]
