"""What rounded weights cost and win: loss on a text, and greedy decoding, for each format.

The loss is next-token cross-entropy over rows of at most `WINDOW` tokens, each from BOS; a row's
`error` is how much greater the loss (nats a token) is than with fp32 weights. `peak_mb` is what
loading the model and generating take in a process of their own. Here, where the formats take turns,
all three stand in memory: 7.1 bytes a parameter.
"""

import json
from pathlib import Path

import torch
from rich.console import Console

from puna.benchmarks import machine
from puna.benchmarks.models.generate import NEW, limit
from puna.benchmarks.models.load_memory import fresh_peak_mb
from puna.benchmarks.models.shapes import Ceilings, multiplied_parameters
from puna.benchmarks.output import card_table, rows_table, write_document
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import interleaved
from puna.core.checkpoint.folder import open_model, tokenizer_path
from puna.core.config import parameter_count
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.native.engine import FORMATS, cached_bytes, engine_for, in_format
from puna.core.text.tokenizer import Tokenizer

WINDOW, ROWS = 256, 8  # tokens a row; rows in one call


def bench_weights(
    model_path: Path, text: Path, tokenizer: Path | None, *, rounds: int, command: str, save: bool
) -> dict[str, object]:
    """Measure a language model (folder or .bin) on a text file; prints a table, then the document.

    Raises ValueError for a model that the native engine does not take.
    """
    source = open_model(model_path)
    models = {name: in_format(source, name) for name in FORMATS}
    config = source.config
    pieces = Tokenizer(tokenizer or tokenizer_path(model_path))
    sequences = windows(
        pieces.encode(text.read_text(encoding="utf-8")), pieces.bos_id, config.context
    )
    losses = {name: loss(model, sequences, name) for name, model in models.items()}
    console = Console(width=max(120, Console().width), markup=False, emoji=False)
    card = machine.card(torch.device("cpu"))
    console.print(card_table(card))
    count = sum(len(ids) - 1 for ids in sequences)
    for name, value in losses.items():
        console.print(
            f"{name}: {value:.5f} nats a token over {count:,} tokens of {text.name}, "
            f"perplexity {torch.tensor(value).exp():.4f}"
        )
    peaks = {name: fresh_peak_mb(model_path, name) for name in FORMATS}
    for name, peak in peaks.items():
        stored = FORMATS[name] * parameter_count(config) / 1e6
        if peak is not None:
            console.print(
                f"{name}: {stored:,.0f} MB of weights, {peak:,.0f} MB at the peak of loading and "
                "generating"
            )
    found = speed(models, model_path.stem, pieces.bos_id, losses, peaks, rounds)
    document: dict[str, object] = {"machine": card, "command": command, "rows": found}
    console.print(rows_table(found))
    if save:
        console.print(f"written to {write_document(document, 'weights')}")
    print(json.dumps(document))
    return document


def windows(ids: list[int], bos_id: int, context: int) -> list[list[int]]:
    """Rows of BOS and the next tokens of the text, `WINDOW` at most with it."""
    step = min(WINDOW, context) - 1
    return [[bos_id, *ids[start : start + step]] for start in range(0, len(ids), step)]


def loss(model: Transformer, sequences: list[list[int]], weights: str) -> float:
    """Mean cross-entropy, nats a token, of all but each row's first token."""
    engine = engine_for(model, weights)
    assert engine is not None
    session = engine.new_session()
    session.reserve(ROWS, max(len(ids) for ids in sequences))
    total, count = 0.0, 0
    for start in range(0, len(sequences), ROWS):
        some = sequences[start : start + ROWS]
        fed = [
            (ids[t], i, t, ids[t + 1]) for i, ids in enumerate(some) for t in range(len(ids) - 1)
        ]
        tokens, rows, positions, targets = torch.tensor(fed).T.contiguous()
        logits = session.logits(tokens, rows, positions, torch.arange(len(fed)))
        picked = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        total, count = total + float(picked.double().sum()), count + len(fed)
    return total / count


def speed(
    models: dict[str, Transformer],
    shape: str,
    bos_id: int,
    losses: dict[str, float],
    peaks: dict[str, float | None],
    rounds: int,
) -> list[Row]:
    """Greedy decoding of one row from BOS by the model of each format, a row a format."""
    config = models["fp32"].config
    new = min(NEW, config.context - 1)

    def decode(weights: str) -> object:
        return generate(
            models[weights],
            [[bos_id]],
            max_new_tokens=new,
            eos_id=None,
            temperature=0.0,
            weight_format=weights,
        )

    device = torch.device("cpu")
    work = {name: lambda name=name: decode(name) for name in FORMATS}
    timings = interleaved(work, rounds, device)
    found = []
    for name, size in FORMATS.items():
        stored = round(size * multiplied_parameters(config))
        ceilings = Ceilings(
            machine.matmul_rate(device, torch.float32), machine.read_rate(device, stored)
        )
        bound = limit(config, ceilings, 1, new / 2, size, cached_bytes(name, config.head_dim))
        found.append(
            row(
                Work("weights", shape, 1, new, bound, name),
                "puna",
                timings[name],
                losses[name] - losses["fp32"],
                peaks[name],
            )
        )
    return found
