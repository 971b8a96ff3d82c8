"""llama.cpp in this process, on Puna's weights in the formats that both have.

Its C functions are called one by one, and the largest logit is looked up in place: less time than
its Python class or its sampler takes. It rotates adjacent pairs of a head, as Meta does, so rows
of q and k are reordered in the files.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.ctypeslib import as_array

from puna.benchmarks.machine import installed
from puna.core.checkpoint.gguf_file import gguf_name
from puna.core.checkpoint.gguf_write import write_settings
from puna.core.checkpoint.source import interleaved, rope_heads
from puna.core.errors import UserError
from puna.core.model import Transformer

STORED = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}  # Puna's formats of weights by its names


class Opened(NamedTuple):
    """A model with room for some rows, and the batch that is handed to it."""

    context: Any
    batch: Any
    vocab_size: int
    rows: int


def llama_cpp_installed() -> bool:
    """Whether llama.cpp can be called, and files for it written."""
    return all(installed(package) for package in ("llama-cpp-python", "gguf"))


@contextmanager
def opened(
    model: Transformer,
    dtype: str,
    folder: Path,
    *,
    rows: int,
    positions: int,
    reads: bool = False,
) -> Iterator[Opened]:
    """`rows` sequences of up to `positions` tokens, on as many threads as PyTorch has.

    `reads`: it is to read prompts. For that it is fastest with its flash attention and, where that
    changes no token, keys and values in fp16; token by token behind 4,096 others it is twice as
    fast without both (15m, version 0.3.36). So each gets what is best for it.
    """
    import llama_cpp

    silence()
    path = folder / f"{dtype}.gguf"
    if not path.exists():
        write_gguf(path, model, dtype)
    loaded = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = rows * positions, rows
    settings.n_batch = max(rows, positions)
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    settings.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO if reads else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    if dtype == "fp32" or not reads:
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(loaded, settings) if loaded else None
    if not context:
        raise UserError(f"llama.cpp opens no {STORED[dtype]} file of this shape")
    batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
    try:
        yield Opened(context, batch, model.config.vocab_size, rows)
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(loaded)


def forget(opened: Opened, behind: int = 0) -> None:
    """Drop what all rows hold from position `behind` on."""
    import llama_cpp

    memory = llama_cpp.llama_get_memory(opened.context)
    for row in range(opened.rows):
        llama_cpp.llama_memory_seq_rm(memory, row, behind, -1)


def prefill(opened: Opened, tokens: Sequence[int], *, behind: int = 0) -> int:
    """The first row's token after `tokens`, which stand from position `behind` on."""
    for place, token in enumerate(tokens):
        wanted = place + 1 == len(tokens)
        put(opened, place, token, position=behind + place, row=0, wanted=wanted)
    return decoded(opened, len(tokens), 1)[0]


def greedy(opened: Opened, starts: Sequence[int], new: int, *, behind: int = 0) -> list[list[int]]:
    """`new` tokens after each row's start, which stands at position `behind`."""
    found: list[list[int]] = [[] for _ in starts]
    last = list(starts)
    for step in range(new):
        for row, token in enumerate(last):
            put(opened, row, token, position=behind + step, row=row, wanted=True)
        last = decoded(opened, len(last), len(last))
        for written, token in zip(found, last, strict=True):
            written.append(token)
    return found


def put(opened: Opened, place: int, token: int, *, position: int, row: int, wanted: bool) -> None:
    """One token of the batch; `wanted`: its logits are."""
    batch = opened.batch
    batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
    batch.n_seq_id[place], batch.seq_id[place][0] = 1, row


def decoded(opened: Opened, tokens: int, wanted: int) -> list[int]:
    """The batch's first `tokens` tokens are run: the likeliest next one of each that is wanted."""
    import llama_cpp

    opened.batch.n_tokens = tokens
    if failed := llama_cpp.llama_decode(opened.context, opened.batch):
        raise UserError(f"llama_decode failed with status {failed}")
    logits = as_array(llama_cpp.llama_get_logits(opened.context), (wanted, opened.vocab_size))
    return logits.argmax(1).tolist()


@functools.cache
def silence() -> object:
    """What llama.cpp would print while it opens a model is dropped; returns what must be kept."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def drop(*_: object) -> None:
        pass

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(drop, None)
    return drop


def write_gguf(path: Path, model: Transformer, dtype: str = "fp32") -> None:
    """The matrices in a format of STORED, without a vocabulary: llama.cpp fills it with names of
    its own."""
    import gguf
    from gguf.quants import quantize

    kind = gguf.GGMLQuantizationType[STORED[dtype]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    write_settings(writer, model.config)
    writer.add_tokenizer_model("no_vocab")
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().float().cpu()
        heads = rope_heads(name, model.config)
        stored = (interleaved(tensor, heads) if heads else tensor).contiguous().numpy()
        if dtype == "fp32" or tensor.dim() < 2:
            writer.add_tensor(gguf_name(name), stored)
        else:
            writer.add_tensor(gguf_name(name), quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
