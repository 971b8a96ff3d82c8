"""Programs that decode on CPUs, on Puna's weights: llama2.c's `run`, and llama.cpp.

Each reads a file that is written here in its own format, begins at BOS and writes greedy tokens.
Both rotate adjacent pairs of a head, as Meta does, so rows of q and k are reordered in the files.
"""

import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from numpy.ctypeslib import as_array
from torch import Tensor

from puna.benchmarks import budget
from puna.benchmarks.machine import installed
from puna.core.checkpoint import llama2c
from puna.core.checkpoint.gguf_file import gguf_name
from puna.core.checkpoint.gguf_write import write_settings
from puna.core.checkpoint.source import interleaved, rope_heads
from puna.core.errors import UserError
from puna.core.model import Transformer

BOS = 1  # where llama2.c's run begins, and where it ends


class Decoded(NamedTuple):
    tokens: list[int]  # the new ones
    seconds: float  # that writing them took, without loading


Decoder = Callable[[], Decoded]


def check_llama2c(executable: Path) -> None:
    """ValueError unless llama2.c's run can be started."""
    if not executable.is_file() or not os.access(executable, os.X_OK):
        raise ValueError(
            f"{executable} is no executable file; compile llama2.c's run.c "
            "(gcc -Ofast -march=native -fopenmp run.c -lm -o run) and give the path of run"
        )


def llama2c_decoder(executable: Path, model: Transformer, new: int, folder: Path) -> Decoder:
    """`new` tokens by llama2.c's run, a process of its own on as many threads as PyTorch has.

    Its time is the one it prints, in whole milliseconds and from the second token on; the first
    is counted at the mean of the others.
    """
    write_llama2c(folder, model)
    command = [str(executable.resolve()), "model.bin", "-t", "0", "-n", str(new)]

    def decode() -> Decoded:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        ended = budget.run(command, cwd=folder, env=environment)
        if ended.returncode:
            raise UserError(
                f"llama2.c's run ended with status {ended.returncode}: {ended.stderr.strip()}"
            )
        return Decoded(read_tokens(ended.stdout, new), new / read_rate(ended.stderr))

    return decode


def write_llama2c(folder: Path, model: Transformer) -> None:
    """model.bin, and a tokenizer.bin that spells every token as its number: `123;`.

    The tokenizer's layout: the longest piece's length (int32), then for each token its score
    (fp32), its length (int32) and its bytes.
    """
    llama2c.write(folder / "model.bin", model.config, _tensors(model))
    pieces = [f"{token};".encode() for token in range(model.config.vocab_size)]
    data = [struct.pack("<i", max(map(len, pieces)))]
    data += [struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces]
    (folder / "tokenizer.bin").write_bytes(b"".join(data))


def read_tokens(printed: str, new: int) -> list[int]:
    """The tokens that run printed with our tokenizer.bin. RuntimeError unless there are `new`."""
    if not re.fullmatch(r"(\d+;)*\s*", printed):
        raise UserError(f"llama2.c's run printed no token numbers: {printed[:80]!r}")
    tokens = [int(number) for number in re.findall(r"\d+", printed)]
    if len(tokens) != new:
        raise UserError(f"llama2.c's run wrote {len(tokens)} tokens, not {new}; BOS ends it")
    return tokens


def read_rate(printed: str) -> float:
    """The tokens a second that run reports."""
    found = re.search(r"achieved tok/s: (\d+(?:\.\d+)?)", printed)
    if not found or not float(found[1]):
        raise UserError(f"llama2.c's run printed no rate: {printed[:80]!r}")
    return float(found[1])


def llama_cpp_installed() -> bool:
    """Whether llama.cpp can be called, and files for it written."""
    return all(installed(package) for package in ("llama-cpp-python", "gguf"))


def llama_cpp_decoder(model: Transformer, new: int, folder: Path) -> Decoder:
    """`new` tokens by llama.cpp in this process, on as many threads as PyTorch has.

    Its C functions are called one by one, and the largest logit is looked up in place: less
    time than its Python class or its sampler takes. Keys and values are fp32, as ours are.
    """
    import llama_cpp

    path = folder / "model.gguf"
    write_gguf(path, model)
    threads = torch.get_num_threads()
    opened = llama_cpp.Llama(
        str(path),
        n_ctx=new + 1,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    shape = (model.config.vocab_size,)

    def decode() -> Decoded:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(opened.ctx), False)
        tokens = []
        token = (llama_cpp.llama_token * 1)(BOS)
        start = time.perf_counter()
        for _ in range(new):
            failed = llama_cpp.llama_decode(opened.ctx, llama_cpp.llama_batch_get_one(token, 1))
            if failed:
                raise UserError(f"llama_decode failed with status {failed}")
            logits = llama_cpp.llama_get_logits_ith(opened.ctx, -1)
            token[0] = int(as_array(logits, shape).argmax())
            tokens.append(token[0])
        return Decoded(tokens, time.perf_counter() - start)

    return decode


def write_gguf(path: Path, model: Transformer) -> None:
    """The weights as fp32, without a vocabulary: llama.cpp fills it with names of its own."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    write_settings(writer, model.config)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(model):
        heads = rope_heads(name, model.config)
        stored = interleaved(tensor, heads) if heads else tensor
        writer.add_tensor(gguf_name(name), stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, by our names, in fp32 on the CPU."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().float().cpu()
