"""The peers of decoding: their files, what is read back from them, a program in llama2.c's place.

Run: python -m pytest tests/test_decode_peers.py -q
"""

import json
import stat
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.benchmarks import output, suite
from puna.benchmarks.models import chat, contexts, decode, decode_peers, llama_cpp
from puna.benchmarks.models.shapes import Shape, open_models
from puna.benchmarks.rows import Row, Work, row
from puna.benchmarks.timing import Timing
from puna.cli.bench import DecodeBenchConfig
from puna.cli.bench import decode as bench_decode
from puna.core.checkpoint import llama2c
from puna.core.config import SIZES, ModelConfig
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.native.loader import extension

CPU = torch.device("cpu")
TINY = ModelConfig(64, 2, 4, 2, 96, 128, context=64)
NEW = 8


@pytest.fixture
def tiny(monkeypatch):
    """Random weights of a shape called "tiny", the only one of the suite."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(suite, "SHAPES", ("tiny",))
    monkeypatch.setattr(decode, "NEW", NEW)
    monkeypatch.setattr(suite, "DECODE_BATCHES", (1,))
    monkeypatch.setattr(suite, "LENGTHS", (12,))
    monkeypatch.setattr(contexts, "BEHIND", 4)
    for module in (chat, contexts, decode, suite):
        monkeypatch.setattr(module, "llama_cpp_installed", lambda: False)
    model = Transformer(TINY)
    model.init_weights(seed=0)
    return model


def greedy(model: Transformer) -> list[int]:
    (found,) = generate(
        model, [[decode_peers.BOS]], max_new_tokens=NEW, eos_id=None, temperature=0.0
    )
    return found.tokens


def program(path: Path, tokens: list[int], rate: float = 123.4) -> Path:
    """Stands in for llama2.c's run: takes its arguments, prints these tokens and this rate."""
    printed = "".join(f"{token};" for token in tokens)
    path.write_text(
        "#!/bin/sh\n"
        f'test "$*" = "model.bin -t 0 -n {NEW}" || exit 3\n'
        f'test "$OMP_NUM_THREADS" = {torch.get_num_threads()} || exit 4\n'
        "test -s model.bin && test -s tokenizer.bin || exit 5\n"
        f"echo '{printed}'\n"
        f"echo 'achieved tok/s: {rate}' >&2\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_llama2c_files(tiny, tmp_path):
    decode_peers.write_llama2c(tmp_path, tiny)
    source = llama2c.open_source(tmp_path / "model.bin")
    assert source.config == TINY
    read = dict(source.tensors())
    assert read.keys() == dict(tiny.named_parameters()).keys()
    for name, parameter in tiny.named_parameters():
        assert torch.equal(read[name], parameter), name


def test_llama2c_tokenizer_spells_numbers(tiny, tmp_path):
    decode_peers.write_llama2c(tmp_path, tiny)
    data = (tmp_path / "tokenizer.bin").read_bytes()
    (longest,) = struct.unpack_from("<i", data)
    pieces, place = [], 4
    while place < len(data):
        _, length = struct.unpack_from("<fi", data, place)
        pieces.append(data[place + 8 : place + 8 + length].decode())
        place += 8 + length
    assert pieces == [f"{token};" for token in range(TINY.vocab_size)]
    assert longest == max(map(len, pieces))


def test_what_run_prints_is_read_back():
    assert decode_peers.read_tokens("17;0;31999;\n", 3) == [17, 0, 31999]
    assert decode_peers.read_rate("achieved tok/s: 741.279070\n") == 741.27907


def test_what_run_should_not_print():
    with pytest.raises(RuntimeError, match="wrote 2 tokens, not 3"):
        decode_peers.read_tokens("17;0;\n", 3)
    with pytest.raises(RuntimeError, match="no token numbers: 'Once upon"):
        decode_peers.read_tokens("Once upon a time\n", 3)
    for printed in ("", "achieved tok/s: inf\n", "achieved tok/s: 0.0\n"):
        with pytest.raises(RuntimeError, match="printed no rate"):
            decode_peers.read_rate(printed)


def test_a_program_in_llama2cs_place(tiny, tmp_path, capsys):
    run = program(tmp_path / "run", greedy(tiny))
    bench_decode(DecodeBenchConfig(rounds=1, llama2c=run))
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document["command"] == "puna bench decode --rounds 1 --device cpu --llama2c run"
    rows = [row for row in document["rows"] if row["bench"] == "decode"]
    ours, theirs = (row for row in rows if row["dtype"] == "fp32")
    assert (ours["provider"], theirs["provider"]) == ("puna", "llama2.c")
    assert theirs["value"] == pytest.approx(123.4)
    assert (theirs["error"], theirs["peak_mb"]) == (0.0, None)
    for key in ("bench", "shape", "batch", "dtype", "unit", "limit"):
        assert ours[key] == theirs[key]
    assert (ours["bench"], ours["batch"], ours["dtype"]) == ("decode", 1, "fp32")
    assert "llama.cpp is not installed: its rows are left out" in printed
    assert "llama2.c: its rows are left out" not in printed


def test_the_table_compares_puna_with_each_peer_at_the_same_work():
    def rows(dtype: str, **rates: float) -> list[Row]:
        work = Work("decode", "tiny", 1, tokens=1, limit=1000.0, dtype=dtype)
        return [
            row(work, name, Timing(*[1 / rate] * 3), error=0.0, peak=None)
            for name, rate in rates.items()
        ]

    found = rows("fp32", puna=600, a=300, b=400) + rows("bf16", puna=900, a=100)
    times = list(output.rows_table(found).columns[9].cells)
    assert times == ["", "2.00x", "1.50x", "", "9.00x"]


def test_other_tokens_are_not_timed(tiny, tmp_path):
    wrong = greedy(tiny)
    wrong[4] = (wrong[4] + 1) % TINY.vocab_size
    run = program(tmp_path / "run", wrong)
    with pytest.raises(RuntimeError, match=r"llama2.c fp32 wrote token .* \(place 4, logits"):
        bench_decode(DecodeBenchConfig(rounds=1, llama2c=run))


def test_a_program_that_fails(tiny, tmp_path):
    run = program(tmp_path / "run", [])
    run.write_text("#!/bin/sh\necho 'malloc failed!' >&2\nexit 1\n")
    opened = open_models(Shape("tiny"), tmp_path / "model", CPU)
    with pytest.raises(RuntimeError, match="ended with status 1: malloc failed!"):
        decode.bench_decode(opened, rounds=1, llama2c=run)


def test_a_program_that_is_not_there(tmp_path):
    plain = tmp_path / "run.c"
    plain.write_text("int main() {}\n")
    for path in (tmp_path / "run", plain, tmp_path):
        with pytest.raises(ValueError, match=r"is no executable file; compile llama2.c's run.c"):
            bench_decode(DecodeBenchConfig(llama2c=path))


def test_decoding_is_compared_on_the_cpu(tiny):
    with pytest.raises(ValueError, match="use --device cpu"):
        bench_decode(DecodeBenchConfig(device="cuda"))


def test_gguf_file(tiny, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra `llama-cpp`)")
    llama_cpp.write_gguf(tmp_path / "model.gguf", tiny)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    read = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    ours = dict(tiny.named_parameters())
    assert len(read) == len(ours)
    assert torch.equal(read["output.weight"], ours["lm_head.weight"])
    assert torch.equal(read["blk.1.ffn_gate.weight"], ours["model.layers.1.mlp.gate_proj.weight"])
    # Row 2i of a head is our row i, row 2i + 1 our row i + D/2.
    half = TINY.head_dim // 2
    for kind in ("q", "k"):
        theirs = read[f"blk.1.attn_{kind}.weight"].view(-1, TINY.head_dim, TINY.dim)
        weight = ours[f"model.layers.1.self_attn.{kind}_proj.weight"]
        heads = weight.detach().view(-1, TINY.head_dim, TINY.dim)
        for i in range(half):
            assert torch.equal(theirs[:, 2 * i], heads[:, i])
            assert torch.equal(theirs[:, 2 * i + 1], heads[:, i + half])


@pytest.fixture
def with_llama_cpp():
    for package in ("gguf", "llama_cpp"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `llama-cpp`)")


def test_llama_cpp_writes_the_same_tokens(with_llama_cpp, tiny, tmp_path):
    with llama_cpp.opened(tiny, "fp32", tmp_path, rows=1, positions=NEW + 1) as opened:
        for _ in range(2):  # what was held is forgotten
            found = decode.llama_cpp_decoded(opened, [decode_peers.BOS], NEW)
            assert found.tokens == [greedy(tiny)] and found.seconds > 0


def test_llama_cpp_writes_the_same_tokens_in_a_batch(with_llama_cpp, tiny, tmp_path):
    starts = [3, 9, 27]
    found = generate(
        tiny, [[start] for start in starts], max_new_tokens=NEW, eos_id=None, temperature=0.0
    )
    with llama_cpp.opened(tiny, "fp32", tmp_path, rows=3, positions=NEW + 1) as opened:
        assert llama_cpp.greedy(opened, starts, NEW) == [each.tokens for each in found]


@pytest.mark.parametrize("dtype", llama_cpp.STORED)
def test_llama_cpp_in_every_format_and_behind_a_prompt(with_llama_cpp, tiny, tmp_path, dtype):
    models = open_models(Shape("tiny"), tmp_path / "model", CPU, peers=False)
    prompt = [5, 80, 2, 33, 61, 7, 90, 14]
    expected = contexts.next_tokens(models.puna, prompt, "fp32", 4, None)
    for reads in (True, False):
        with llama_cpp.opened(tiny, dtype, tmp_path, rows=1, positions=32, reads=reads) as opened:
            first = llama_cpp.prefill(opened, prompt)
            llama_cpp.forget(opened, len(prompt) - 1)
            found = llama_cpp.greedy(opened, prompt[-1:], 4, behind=len(prompt) - 1)[0]
        assert found[0] == first
        if dtype == "fp32":
            assert found == expected


def test_prompts_and_what_is_decoded_behind_them(tiny, tmp_path):
    models = open_models(Shape("tiny"), tmp_path / "model", CPU, peers=False)
    rows = contexts.bench_prompt(models, 100, 1) + contexts.bench_behind(models, 100, 1)
    found = [(row["bench"], row["operation"], row["dtype"]) for row in rows]
    formats = ["fp32"] if extension() is None else ["fp32", "bf16", "int8"]
    assert found == [
        (bench, operation, dtype)
        for bench, operation in (("prefill", "100 tokens"), ("context", "behind 100 tokens"))
        for dtype in formats
    ]
    assert all(row["value"] > 0 and row["limit"] > 0 for row in rows)


def test_a_chat_keeps_what_was_run(tiny, tmp_path):
    models = open_models(Shape("tiny"), tmp_path / "model", CPU, peers=False)
    rows = chat.bench_chat(models, 1)
    formats = ["fp32"] if extension() is None else ["fp32", "bf16", "int8"]
    assert [(row["operation"], row["dtype"]) for row in rows] == [
        *(("10 turns", dtype) for dtype in formats),
        ("10 turns, all run again", "fp32"),
    ]
    assert rows[0]["error"] == rows[-1]["error"] == 0
    wrong = [[0] * chat.ANSWERED] * chat.TURNS
    questions = [[7] * chat.ASKED] * chat.TURNS
    longer = contexts.with_context(models.puna, chat.POSITIONS + 1)
    right = chat.chat(longer, questions, "fp32", True)
    assert right == chat.chat(longer, questions, "fp32", False)
    answers = {("puna", "fp32"): right, ("other", "fp32"): wrong}
    with pytest.raises(RuntimeError, match="nothing was timed: other fp32 wrote token"):
        chat.errors_of(replace(models, puna=longer), questions, answers)


def test_llama_cpp_chats_alike(with_llama_cpp, tiny, tmp_path):
    longer = contexts.with_context(tiny, chat.POSITIONS + 1)
    questions = torch.randint(90, (chat.TURNS, chat.ASKED)).tolist()
    expected = chat.chat(longer, questions, "fp32", True)
    room = chat.POSITIONS + 1
    with llama_cpp.opened(longer, "fp32", tmp_path, rows=1, positions=room) as opened:
        for _ in range(2):  # what was held is forgotten
            assert chat.llama_cpp_chat(opened, questions) == expected


def test_a_longer_context_shares_the_weights(tiny):
    longer = contexts.with_context(tiny, 200)  # tiny's own is 64
    assert longer.config.context == 200
    assert longer.lm_head.weight.data_ptr() == tiny.lm_head.weight.data_ptr()
    ids = torch.arange(1, 40)[None]
    assert torch.equal(longer(ids), tiny(ids))
    assert contexts.with_context(tiny, 64) is tiny


def test_the_products_of_a_prompt_are_those_that_pytorch_counts(tiny):
    from torch.utils.flop_counter import FlopCounterMode

    def counted(tokens):  # that are wanted; one alone is computed twice
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tiny.logits(tiny(torch.arange(length)[None], wanted=torch.arange(tokens)))
        return counter.get_total_flops()

    length = 48
    # Of a query and a key: attention is an operation that it does not count.
    pairs = (TINY.n_layers - 1) * length**2 / 2 + length
    attention = 2 * 2 * TINY.n_heads * TINY.head_dim * pairs
    found = contexts.products_of_prompt(TINY, length)
    assert found == 2 * counted(2) - counted(3) + attention
