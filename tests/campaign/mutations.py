"""Damage, drawn from a random generator: bytes, numbers in headers, values of JSON."""

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1e-5, -0.0, 7, 10**6, 10**9, 10**30, 2**31, -(2**63),
    1e30, 1e308, float("inf"), float("-inf"), float("nan"), "", "x", "no", "0", "None", [], [[]],
    {}, [None], [3], {"a": 1}, "a\x1b[2J", "\ud800", "[INST]", " ", "\u2028", "x" * 5000,
    "../x", "/dev/zero", ["a", "b"], [{"role": "user", "content": "a"}],
)  # fmt: skip


def damaged(data: bytes, rng: Random) -> bytes:
    """One to four changes of bytes, half of them where headers are."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            return data
        end = len(data) if rng.random() < 0.5 else min(len(data), 512)
        at, size = rng.randrange(end), rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + size :]
        elif kind == 3:
            data = data[:at] + rng.randbytes(size) + data[at:]
        elif kind == 4:
            data = data[:at] + data[at : at + size] * rng.choice((2, 3, 100)) + data[at + size :]
        elif kind == 5:
            form = rng.choice("<I <Q >I <H <B".split())
            number = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form))
            data = data[:at] + struct.pack(form, number) + data[at + struct.calcsize(form) :]
        else:
            other = rng.randrange(len(data))
            data = data[:at] + data[other : other + size] + data[at + size :]
    return data


def integers(data: bytes, rng: Random, count: int = 7) -> bytes:
    """One or two of the first `count` 32-bit numbers replaced."""
    numbers = list(struct.unpack_from(f"<{count}i", data))
    for _ in range(rng.choice((1, 1, 2))):
        near = numbers[rng.randrange(count)] + rng.choice((-1, 1, 1000))
        numbers[rng.randrange(count)] = rng.choice(
            (near, -near, 0, -1, 2**31 - 1, -(2**31), 2**20, rng.randrange(-(2**31), 2**31))
        )
    numbers = [max(-(2**31), min(2**31 - 1, number)) for number in numbers]
    return struct.pack(f"<{count}i", *numbers) + data[4 * count :]


def value(document: Any, rng: Random) -> Any:
    """A JSON document with one to three of its values replaced, dropped, renamed or doubled."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = _place({"": document}, rng)
        if key == "":
            return copy.deepcopy(rng.choice(VALUES))
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "a\nb", "A" * 300, key.upper()))] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], (int, float)) and holder[key] is not True:
            holder[key] = rng.choice((holder[key] * 2, -holder[key], holder[key] + 1, holder[key]))
        elif kind == 3:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return document


def _place(holder: Any, rng: Random) -> tuple[Any, Any]:
    """(what holds, key) of a value somewhere in a document."""
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or (rng.random() < 0.15 and key != ""):
            return holder, key
        holder = inner


def json_text(document: Any, rng: Random) -> bytes:
    """JSON as others write it: with escapes or without, NaN and all."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def json_file(data: bytes, rng: Random) -> bytes:
    """A JSON document: its values most of the time, else its bytes."""
    if rng.random() < 0.2:
        return damaged(data, rng)
    return json_text(value(json.loads(data), rng), rng)


def json_lines(data: bytes, rng: Random) -> bytes:
    """JSON lines: the values or the bytes of one, or all of the file's bytes."""
    if rng.random() < 0.2:
        return damaged(data, rng)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines) - 1)
    change: Callable[[bytes, Random], bytes] = json_file if rng.random() < 0.9 else damaged
    lines[at] = change(lines[at], rng)
    return b"\n".join(lines)


def safetensors_file(data: bytes, rng: Random) -> bytes:
    """The JSON of the header, with its length set right most of the time, or bytes."""
    if rng.random() < 0.4:
        return damaged(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = json_text(value(json.loads(data[8 : 8 + size]), rng), rng)
    length = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return length.to_bytes(8, "little") + header + data[8 + size :]


def text_file(data: bytes, rng: Random) -> bytes:
    """Text (TOML, a .npy's header): a token exchanged for another, or bytes."""
    if rng.random() < 0.4:
        return damaged(data, rng)
    old, new = rng.sample(TOKENS, 2)
    places = data.count(old)
    if not places:
        return damaged(data, rng)
    return data.replace(old, new, rng.randrange(1, places + 1))


TOKENS = [
    *b"= [ ] { } \" ' . , 1 0 true 1e-5 ( ) : # nan inf -1 9e999".split(), b"\n",
    b"'''", b'"""', b"\\", b"\\u", b"\xff", b"base", b"lr", b"1" * 5000, b"a." * 2000,
    b"[" * 2000, b"<u2", b"|O", b"<f4", b"(8,)", b"True", b"False", b"None", b"{'a': 1}",
]  # fmt: skip
