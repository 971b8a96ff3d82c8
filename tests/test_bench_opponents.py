"""Opponents that cannot run here, as stand-ins of the same calls: each adapter asks them for what
the operation is, and a broken one costs a sentence and its rows.

Run: python -m pytest tests/test_bench_opponents.py -q
"""

import json
import stat
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from puna.benchmarks import machine, opponents, suite
from puna.benchmarks.kernels import cases as kernel_cases
from puna.benchmarks.kernels import opponents as adapters
from puna.benchmarks.kernels import peers
from puna.benchmarks.kernels.verify import verify
from puna.benchmarks.models import chat, contexts, decode, generate, llama_bench, vllm
from puna.benchmarks.models.shapes import Shape, open_models
from puna.cli.main import main
from puna.core.checkpoint.folder import load_model
from puna.core.config import SIZES, ModelConfig

CPU = torch.device("cpu")
TINY = ModelConfig(64, 2, 4, 2, 96, 128, context=64)
SIZE = kernel_cases.Sizes(
    dtype=torch.float32, rows=16, widths=(24,), sequences=2, tokens=8, heads=((2, 1),),
    head_dim=8, decoded=3, dim=12, vocabularies=(40,), drawn=4, rollouts=(3, 5),
)  # fmt: skip


def install(monkeypatch, name, where, **functions):
    """A module of that name, as if pip had brought it."""
    parts = where.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        module = sys.modules.get(path) or ModuleType(path)
        monkeypatch.setitem(sys.modules, path, module)
    vars(module).update(functions)
    package = opponents.PACKAGES[name][0]
    monkeypatch.setattr(opponents, "installed", lambda asked: "9.9" if asked == package else None)
    opponents.module.cache_clear()


@pytest.fixture(autouse=True)
def forgotten():
    yield
    opponents.module.cache_clear()


def check(function, operation):
    case = next(c for c in kernel_cases.cases(SIZE, CPU) if c.operation == operation)
    for backward in (False, bool(case.differentiable)):
        verdict = verify(case, {"x": function}, case.make(), backward)["x"]
        assert verdict.failed is None, verdict.failed


def test_quack(monkeypatch):
    def rmsnorm(x, weight=None, bias=None, residual=None, *, eps=1e-6, prenorm=False):
        if residual is None:
            return peers.rms_norm(x, weight)[0]
        assert prenorm and eps == peers.EPS
        return peers.add_rms_norm(x, residual, weight)

    def loss(x, weight, target, chunk_size=4096):
        return cross_entropy((x @ weight.T).float(), target)

    install(monkeypatch, "quack", "quack", rmsnorm=rmsnorm)
    install(monkeypatch, "quack", "quack.linear_cross_entropy", chunked_linear_cross_entropy=loss)
    for operation in ("rms_norm", "add_rms_norm", "linear_cross_entropy"):
        check(adapters.quack(operation), operation)
    assert adapters.quack("rope") is None


def test_flash_attn(monkeypatch):
    def whole(q, k, v, causal):
        assert causal
        return peers.sdpa(q, k, v)[0]

    def cached(q, k_cache, v_cache, cache_seqlens, causal):
        assert cache_seqlens.dtype == torch.int32
        return peers.decode_attention(q, k_cache, v_cache, cache_seqlens)[0]

    install(
        monkeypatch, "flash-attn", "flash_attn", flash_attn_func=whole,
        flash_attn_with_kvcache=cached,
    )  # fmt: skip
    for operation in ("attention", "decode_attention"):
        check(adapters.flash_attn(operation), operation)


def test_trl(monkeypatch):
    def chosen(logits, index):
        return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]

    def entropy(logits):
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    install(
        monkeypatch, "trl", "trl.trainer.utils", selective_log_softmax=chosen,
        entropy_from_logits=entropy,
    )  # fmt: skip
    check(adapters.trl("linear_logprobs"), "linear_logprobs")


def test_a_broken_version_is_one_sentence(monkeypatch):
    def broken(name):
        raise RuntimeError("undefined symbol: _ZN3c10\nand so on")

    monkeypatch.setattr(opponents, "installed", lambda package: "2.8")
    monkeypatch.setattr(opponents.importlib, "import_module", broken)
    opponents.module.cache_clear()
    assert adapters.peers_of("attention", torch.device("cuda")) == {}
    lines = opponents.absent(opponents.KERNELS)
    assert len(lines) == 4 and lines[2] == (
        "flash-attn 2.8 is installed and does not work here, its rows are left out: "
        "undefined symbol: _ZN3c10"
    )


def test_none_is_installed(monkeypatch):
    monkeypatch.setattr(opponents, "installed", lambda package: None)
    opponents.module.cache_clear()
    for operation in ("rms_norm", "attention", "linear_logprobs", "linear_cross_entropy"):
        assert adapters.peers_of(operation, torch.device("cuda")) == {}
    assert opponents.absent(opponents.KERNELS) == []


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    for name, value in (("PROMPT", 4), ("NEW", 6)):
        monkeypatch.setattr(generate, name, value)
    monkeypatch.setattr(decode, "NEW", 8)
    monkeypatch.setattr(contexts, "BEHIND", 4)
    monkeypatch.setattr(suite, "LENGTHS", (12,))
    for module in (chat, contexts, decode, suite):
        monkeypatch.setattr(module, "llama_cpp_installed", lambda: False)


def test_vllm_answers_beside_the_others(tiny, monkeypatch, tmp_path):
    class LLM:
        def __init__(self, model, skip_tokenizer_init, dtype, max_model_len, **options):
            assert skip_tokenizer_init and dtype == "float32" and max_model_len == TINY.context
            self.model = load_model(model)

        def generate(self, prompts, settings, use_tqdm):
            assert settings.ignore_eos and not settings.detokenize and not settings.temperature
            ids = [each["prompt_token_ids"] for each in prompts]
            found = generate.generate(
                self.model, ids, max_new_tokens=settings.max_tokens, eos_id=None, temperature=0.0
            )
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(each.tokens))])
                for each in found
            ]

    install(monkeypatch, "vllm", "vllm", LLM=LLM, SamplingParams=SimpleNamespace)
    engine = vllm.opponents.function("vllm", "LLM")
    monkeypatch.setattr(
        "puna.benchmarks.models.shapes.open_vllm",
        lambda folder, device, *rest: vllm.open_vllm(folder, torch.device("cuda"), *rest),
    )
    assert engine is LLM
    models = open_models(Shape("tiny"), tmp_path / "model", CPU, engines=True)
    rows = generate.bench_generate(models, 3, 1)
    assert "vllm" in [row["provider"] for row in rows]
    assert all(row["error"] == 0 for row in rows)


def test_vllm_that_does_not_open(monkeypatch, capsys, tmp_path):
    def broken(**options):
        raise RuntimeError("Engine core initialization failed")

    install(monkeypatch, "vllm", "vllm", LLM=broken)
    assert vllm.open_vllm(tmp_path, torch.device("cuda"), "bf16", 64) is None
    assert "vllm is installed and does not work here" in capsys.readouterr().out
    assert vllm.open_vllm(tmp_path, CPU, "bf16", 64) is None


def program(path, printed, status=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{printed}'\necho 'out of luck' >&2\nexit {status}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_builds_of_llama_cpp_by_their_paths(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llama_bench, "installed", lambda package: "0.17")
    monkeypatch.setattr(llama_bench, "write_gguf", lambda path, model: path.write_bytes(b"x"))
    rate = json.dumps([{"n_gen": 8, "avg_ts": 321.0}])
    one = program(tmp_path / "ik_llama.cpp" / "build" / "bin" / "llama-bench", rate)
    two = program(tmp_path / "llama-bench", rate)
    flags = ["--llama-bench", str(one), f"zendnn={two}", "--shape", "tiny", "--rounds", "1"]
    assert main(["bench", "decode", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    theirs = {row["provider"]: row for row in found["rows"] if row["provider"] != "puna"}
    assert list(theirs) == ["ik_llama.cpp", "zendnn"]
    assert all(
        row["value"] == pytest.approx(321) and row["error"] is None for row in theirs.values()
    )
    assert found["command"].endswith("--llama-bench ik_llama.cpp zendnn")


@pytest.mark.parametrize(
    ("printed", "status", "said"),
    [
        ("hello", 0, "printed no rate"),
        ('[{"avg_ts": 0}]', 0, "printed no rate"),
        ("[]", 0, "printed no rate"),
        ("", 3, "ended with status 3: out of luck"),
    ],
)
def test_a_build_that_does_not_measure(tiny, tmp_path, monkeypatch, printed, status, said):
    monkeypatch.setattr(llama_bench, "write_gguf", lambda path, model: path.write_bytes(b"x"))
    wrong = program(tmp_path / "llama-bench", printed, status)
    with pytest.raises(RuntimeError, match=said):
        llama_bench.llama_bench_decoder(wrong, None, 8, tmp_path)()


def test_programs_that_cannot_be_taken(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is no executable file; give the path of a llama-bench"):
        llama_bench.named_programs([str(tmp_path / "llama-bench")])
    there = program(tmp_path / "llama-bench", "x")
    with pytest.raises(ValueError, match="two llama-bench are called 'a'"):
        llama_bench.named_programs([f"a={there}", f"a={there}"])
    monkeypatch.setattr(llama_bench, "installed", lambda package: None)
    with pytest.raises(ValueError, match="takes the package gguf"):
        llama_bench.named_programs([str(there)])
