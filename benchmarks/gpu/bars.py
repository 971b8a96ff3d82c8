"""What was measured on a GPU beside what is wanted of it.

    python -m puna.benchmarks.gpu.bars FOLDER ...

reads the documents in folders (of `make gpu`, or of `puna bench --save`) and prints a line a bar.
A bar without a row is "not measured", and one that is meant for another GPU or a deeper model shows
its figure and is not judged. The backward pass is forward+backward without the forward.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from puna.core.documents import parse_json, read_object
from puna.core.terminal import say_table

Row = Mapping[str, Any]
WIDTHS, VOCABULARIES = (4096, 11008), (32000, 128256)
MEMORY = ("rms_norm", "add_rms_norm", "rope", "swiglu")
LOSSES = ("linear_cross_entropy", "linear_logprobs")
ATTENTION = ("2x4096 32/32x128", "2x4096 64/8x128", "1x16384 32/32x128", "1x16384 64/8x128")
NOT_MEASURED = "not measured"


class Bar(NamedTuple):
    name: str
    wanted: str
    measured: str
    met: bool | None  # None: not measured, or not judged
    operation: str = ""  # of kernels/


def bars(documents: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """Every bar, over {"machine", "rows"} as the suite writes them; of two rows of one kind that of
    the later document counts."""
    rows: list[Row] = []
    for document in documents:
        gpu = document["machine"].get("gpu")
        rows += [{**row, "gpu": gpu} for row in document["rows"]]
    found = [*memory_bound(rows), *attention(rows), *losses(rows), *training(rows)]
    return [*found, *sampling(rows), *first_calls(rows)]


def memory_bound(rows: Sequence[Row]) -> Iterator[Bar]:
    for operation in MEMORY:
        for width in WIDTHS:
            shape = f"8192x{width}"
            for way, least in (("forward", 0.9), ("backward", 0.8)):
                share = reached(rows, operation, shape, way)
                yield at_least(f"{operation} {shape} {way}", "of copying", share, least, operation)
            yield not_slower(rows, operation, shape, ("torch-compiled", "liger-kernel"))


def attention(rows: Sequence[Row]) -> Iterator[Bar]:
    for shape in ATTENTION:
        for way, least in (("forward", 0.6), ("backward", 0.45)):
            share = reached(rows, "attention", shape, way)
            yield at_least(f"attention {shape} {way}", "of matmul", share, least, "attention")
        ours = kernel(rows, "attention", shape, "forward")
        flash = kernel(rows, "attention", shape, "forward", "flash-attn")
        ratio = ours["value"] / flash["value"] if ours and flash else None
        name = f"attention {shape} forward beside flash-attn"
        measured = NOT_MEASURED if ratio is None else f"{ratio:.2f} times as fast"
        met = None if ratio is None else ratio >= 1.05
        yield Bar(name, "1.05 times as fast", measured, met, "attention")
        yield not_slower(rows, "attention", shape, ("sdpa", "flash-attn"))


def losses(rows: Sequence[Row]) -> Iterator[Bar]:
    for operation in LOSSES:
        for vocabulary in VOCABULARIES:
            shape = f"8192x4096x{vocabulary}"
            for way in ("forward", "forward+backward"):
                share = reached(rows, operation, shape, way)
                measured = NOT_MEASURED if share is None else f"{1 / share:.2f} times"
                met = None if share is None else 1 / share <= 1.25
                name = f"{operation} {shape} {way}"
                yield Bar(name, "at most 1.25 times its matmuls", measured, met, operation)
            row = kernel(rows, operation, shape, "forward+backward")
            measured, met = NOT_MEASURED, None
            if row is not None and row["peak_mb"] is not None:
                gradients = 2 * 4096 * (8192 + vocabulary) / 1e6  # of hidden and weight, in bf16
                beyond = row["peak_mb"] - gradients
                measured, met = f"{beyond:,.0f} MB", beyond <= 300
            wanted = "at most 300 MB beyond gradients"
            yield Bar(f"{operation} {shape} memory", wanted, measured, met, operation)


def training(rows: Sequence[Row]) -> Iterator[Bar]:
    row = model(rows, "train", "puna")
    yield share_of(row, "train 7b, 4,096 tokens a row", "MFU", 0.55)
    row = model(rows, "train", "puna-recompute")
    name, wanted = "train 7b, full recomputation", "12,500 tok/s on an H200"
    if row is None:
        yield Bar(name, wanted, NOT_MEASURED, None)
        return
    measured = f"{row['value']:,.0f} tok/s ({row['shape']}, {row['gpu']})"
    judged = row["shape"] == "7b" and "H200" in str(row["gpu"])
    yield Bar(name, wanted, measured, row["value"] >= 12_500 if judged else None)


def sampling(rows: Sequence[Row]) -> Iterator[Bar]:
    for batch, least in ((1, 0.85), (64, 0.6)):
        row = model(rows, "generate", "puna", batch=batch)
        yield share_of(row, f"generate 7b, {batch} at once", "of the bandwidth's limit", least)
    row = model(rows, "rollout", "puna")
    yield figure("rollout 7b, 512 prompts", row)
    for part in ("iteration", "sampling", "scoring", "reference", "update"):
        row = model(rows, "rlhf", "puna", operation=part)
        share = f" ({row['share']:.0%} of it)" if row and "share" in row else ""
        yield figure(f"PPO 7b, {part}{share}", row)


def first_calls(rows: Sequence[Row]) -> Iterator[Bar]:
    found = {row["operation"]: row for row in rows if row.get("bench") == "first call"}
    name, again = "first call to any kernel", "calls of other lengths"
    if not found:
        yield Bar(name, "at most 3 s", NOT_MEASURED, None)
        yield Bar(again, "compile nothing", NOT_MEASURED, None)
        return
    slowest = max(found.values(), key=lambda row: row["seconds"])
    measured = f"{slowest['seconds']:.1f} s ({slowest['operation']}, of {len(found)})"
    yield Bar(name, "at most 3 s", measured, slowest["seconds"] <= 3)
    compiled = {operation: row["further"] for operation, row in found.items() if row["further"]}
    told = ", ".join(f"{operation} {len(names)}" for operation, names in compiled.items())
    yield Bar(again, "compile nothing", told or "nothing", not compiled)


def kernel(
    rows: Sequence[Row], operation: str, shape: str, direction: str, provider: str = "puna"
) -> Row | None:
    """The last such row that was timed, in bf16."""
    done = {"bench": "kernel", "operation": operation, "shape": shape, "direction": direction}
    done |= {"provider": provider, "dtype": "bf16"}
    found = [row for row in rows if all(row.get(key) == value for key, value in done.items())]
    return next((row for row in reversed(found) if row["value"] is not None), None)


def reached(rows: Sequence[Row], operation: str, shape: str, way: str) -> float | None:
    """The share of the ceiling in a direction; "backward" is what the forward leaves of both."""
    if way != "backward":
        row = kernel(rows, operation, shape, way)
        return None if row is None else row["value"] / row["limit"]
    forward = kernel(rows, operation, shape, "forward")
    both = kernel(rows, operation, shape, "forward+backward")
    if forward is None or both is None or both["ms"] <= forward["ms"]:
        return None
    work = both["value"] * both["ms"] - forward["value"] * forward["ms"]
    return float(work / (both["ms"] - forward["ms"]) / both["limit"])


def not_slower(rows: Sequence[Row], operation: str, shape: str, peers: Iterable[str]) -> Bar:
    """Beside peers, forward and with backward: beyond the noise of both, p20 to p80."""
    ratios: dict[str, float] = {}
    slower = False
    for way in ("forward", "forward+backward"):
        ours = kernel(rows, operation, shape, way)
        for peer in peers:
            theirs = kernel(rows, operation, shape, way, peer)
            if ours and theirs:
                ratios[f"{peer} {way}"] = ours["value"] / theirs["value"]
                slower = slower or ours["p80"] < theirs["p20"]
    name = f"{operation} {shape} beside {', '.join(peers)}"
    if not ratios:
        return Bar(name, "never slower", NOT_MEASURED, None, operation)
    peer, least = min(ratios.items(), key=lambda each: each[1])
    return Bar(name, "never slower", f"{least:.2f} of {peer}'s rate", not slower, operation)


def model(rows: Sequence[Row], bench: str, provider: str, **further: object) -> Row | None:
    """The last row of 7B in bf16; of the whole model, where there is one, else of its first
    blocks."""
    done = {"bench": bench, "provider": provider, "dtype": "bf16", **further}
    found = [row for row in rows if all(row.get(key) == value for key, value in done.items())]
    cut = [row for row in found if str(row["shape"]).startswith("7b cut")]
    whole = [row for row in found if row["shape"] == "7b"]
    return next(reversed(whole or cut), None)


def at_least(name: str, of: str, share: float | None, least: float, operation: str = "") -> Bar:
    measured = NOT_MEASURED if share is None else f"{share:.1%}"
    met = None if share is None else share >= least
    return Bar(name, f"{least:.0%} {of}", measured, met, operation)


def share_of(row: Row | None, name: str, of: str, least: float) -> Bar:
    bar = at_least(name, of, None if row is None else row["value"] / row["limit"], least)
    if row is None:
        return bar
    return bar._replace(measured=f"{bar.measured}, {row['value']:,.0f} tok/s ({row['shape']})")


def figure(name: str, row: Row | None) -> Bar:
    """A figure of which nothing is asked but that it is there."""
    measured = NOT_MEASURED if row is None else f"{row['value']:,.0f} tok/s ({row['shape']})"
    return Bar(name, "a figure", measured, None)


def documents(folder: Path) -> list[dict[str, Any]]:
    """The suite's documents in a folder, older ones first: .json files, and the last whole such
    line of .log files. ValueError for a folder that is none, and for a .json that is no JSON."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; give one of `make gpu`, or of `puna bench --save`"
        )
    found: list[dict[str, Any]] = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.stat().st_mtime, path.name)):
        if path.suffix == ".json":
            found.append(read_object(path))
        elif path.suffix == ".log":
            found += last_document(path)
    return [each for each in found if isinstance(each.get("rows"), list) and each.get("machine")]


def last_document(log: Path) -> list[dict[str, Any]]:
    """One or none: what a kill has cut off is not there, and stops nothing else."""
    for line in reversed(log.read_bytes().splitlines()):
        if line.startswith(b'{"machine"'):
            with suppress(ValueError):
                return [parse_json(line, str(log), "")]
    return []


def table(found: Sequence[Bar]) -> None:
    """Print them."""
    said = {True: "met", False: "NOT met", None: ""}
    cells = [(bar.name, bar.wanted, bar.measured, said[bar.met]) for bar in found]
    say_table(cells, ("what", "bar", "measured", ""), "bf16, of the rates that this GPU reached")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("name folders of results: python -m puna.benchmarks.gpu.bars FOLDER ...")
    try:
        table(bars([each for folder in sys.argv[1:] for each in documents(Path(folder))]))
    except ValueError as error:
        sys.exit(str(error))
