"""Models that are read into rounded weights piece by piece: the same answers, a fourth of the
memory.

Run: python -m pytest tests/test_rounded_weights.py -q
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import puna
from puna.benchmarks.models.load_memory import fresh_peak_mb
from puna.core import ops
from puna.core.checkpoint import folder
from puna.core.checkpoint.folder import open_source, save_model
from puna.core.config import ModelConfig, parameter_count
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.native.engine import FORMATS, Engine, in_format, instruction_sets
from puna.core.native.loader import extension
from puna.core.rope_scaling import RopeScaling

pytestmark = pytest.mark.skipif(extension() is None, reason="the native engine is not built")

SHAPES = [
    ModelConfig(64, 2, 4, 2, 96, 128, context=64),
    ModelConfig(96, 1, 3, 3, 80, 131, context=64),
    ModelConfig(64, 1, 2, 1, 72, 50, context=64, head_size=64),
]
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 2, 30]]


def saved(path: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Path:
    model = Transformer(config)
    model.init_weights(seed=0)
    save_model(path, model.to(dtype), shard_bytes=40_000)
    return path


def answers(model: Transformer, weight_format: str) -> list:
    return generate(
        model, PROMPTS, max_new_tokens=12, eos_id=None, seed=3, weight_format=weight_format
    )


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.dim}-{c.vocab_size}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_same_answers_as_from_a_model_in_memory(
    tmp_path, monkeypatch, config, dtype, weight_format
):
    monkeypatch.setattr(folder, "PIECE", 7 * config.dim)  # not a divisor of what there is
    path = saved(tmp_path / "model", config, dtype)
    whole = folder.load_model(path)
    assert answers(in_format(open_source(path), weight_format), weight_format) == answers(
        whole, weight_format
    )


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 2.0),
        RopeScaling("llama3", 8.0, original_max_position_embeddings=32),
        RopeScaling("yarn", 4.0, original_max_position_embeddings=16, attention_factor=1.1),
    ],
    ids=lambda scaling: scaling.rope_type,
)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_stretched_context_is_read_too(tmp_path, scaling, weight_format):
    path = saved(tmp_path / "model", replace(SHAPES[0], rope_scaling=scaling))
    assert answers(in_format(open_source(path), weight_format), weight_format) == answers(
        folder.load_model(path), weight_format
    )


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.dim}-{c.vocab_size}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_same_logits_with_every_instruction_set(
    tmp_path, monkeypatch, config, dtype, weight_format
):
    monkeypatch.setattr(folder, "PIECE", 5 * config.dim)
    path = saved(tmp_path / "model", config, dtype)
    assert len(list(path.glob("*.safetensors"))) > 1
    whole, source = folder.load_model(path), open_source(path)
    known = instruction_sets(config.head_dim)
    for name in known:
        read, packed = (
            logits_of(Engine.read(source, weight_format, name)),
            logits_of(Engine(whole, name, weight_format=weight_format)),
        )
        assert torch.equal(read, packed), name
    assert known and read.std() > 0.01


def logits_of(engine: Engine) -> torch.Tensor:
    session = engine.new_session()
    session.reserve(1, 40)
    tokens, places = torch.arange(20) * 2 + 3, torch.arange(20)
    return session.logits(tokens, torch.zeros(20, dtype=torch.int64), places, places)


def test_pieces_are_the_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PIECE", 500)
    path = saved(tmp_path / "model", SHAPES[0])
    source = open_source(path)
    found: dict[str, list[torch.Tensor]] = {}
    for name, first, rows in source.pieces():
        assert first == sum(map(len, found.get(name, [])))
        found.setdefault(name, []).append(rows.clone())
    whole = dict(source.tensors())
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(torch.cat(found[name]), tensor)
    assert max(map(len, found.values())) > 5


def test_a_tied_head_is_packed_from_the_embedding(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96,
        vocab_size=70, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    source = open_source(tmp_path / "tied")
    names = [name for name, _, _ in source.pieces()]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {*names}
    whole = folder.load_model(tmp_path / "tied")
    assert answers(in_format(source, "int8"), "int8") == answers(whole, "int8")


def test_what_replaces_a_sources_tensors_replaces_its_pieces(tmp_path):
    source = open_source(saved(tmp_path / "model", SHAPES[0]))
    other = source._replace(tensors=lambda: iter([("a", torch.ones(2, 2))]))
    assert [(name, first) for name, first, _ in other.pieces()] == [("a", 0)]


def test_such_a_model_generates_and_does_nothing_else(tmp_path):
    path = saved(tmp_path / "model", SHAPES[0])
    llama = puna.load(path, device="cpu", weight_format="int8")
    assert llama.model.device.type == "meta" and "int8 on cpu" in repr(llama)
    with pytest.raises(ValueError, match="loaded with int8 weights, to generate; load it without"):
        llama.save(tmp_path / "again")
    with pytest.raises(ValueError, match="in memory as int8 alone; load it again for bf16"):
        generate(llama.model, PROMPTS, max_new_tokens=1, eos_id=None, weight_format="bf16")
    with pytest.raises(ValueError, match="weight_format is 'int4'; expected one of fp32"):
        puna.load(path, weight_format="int4")
    with pytest.raises(ValueError, match="int8 weights are read on one CPU"):
        puna.load(path, device="cpu", dtype="bf16", weight_format="int8")
    with ops.use_backend("reference"), pytest.raises(ValueError, match="need the native engine"):
        puna.load(path, device="cpu", weight_format="int8")
    judge = Transformer(SHAPES[0], "score")
    judge.init_weights(seed=0)
    save_model(tmp_path / "judge", judge)
    with pytest.raises(ValueError, match="is a reward model; int8 weights are for a language mod"):
        puna.load(tmp_path / "judge", device="cpu", weight_format="int8")


def test_what_the_engine_does_not_take_is_said(tmp_path):
    path = saved(tmp_path / "model", replace(SHAPES[0], head_size=10))
    with pytest.raises(
        ValueError, match="does not take this model: its head size is 10; leave int8 out"
    ):
        puna.load(path, device="cpu", weight_format="int8")


def test_an_embeddings_rows_are_rounded_in_groups_of_32(tmp_path):
    """Its int8 engine has the logits of an fp32 model whose embedding was rounded by hand."""
    model = Transformer(SHAPES[0])
    model.init_weights(seed=0)
    rounded = Transformer(SHAPES[0])
    rounded.load_state_dict(model.state_dict())
    groups = model.model.embed_tokens.weight.detach().view(-1, 32)
    scale = groups.abs().amax(1, keepdim=True) / 127
    with torch.no_grad():
        rounded.model.embed_tokens.weight.copy_((groups / scale).round().mul(scale).view(-1, 64))
    logits = [logits_of(Engine(each, weight_format="int8")) for each in (model, rounded)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-3)


def test_rows_beyond_a_tensor_and_unknown_parts_are_refused():
    model = Transformer(SHAPES[0])
    model.init_weights(seed=0)
    native = Engine(model)._native
    rows = torch.zeros(200, 96)
    for part, layer, first, count in (
        ("embedding", 0, 100, 29), ("head", 0, -1, 2), ("q", 0, 60, 5), ("k", 1, 0, 33),
        ("norm", 0, 60, 5), ("up", 2, 0, 1), ("up", -1, 0, 1), ("bias", 0, 0, 1),
        ("ffn_norm", 0, 0, 65), ("down", 0, 1, 2**63 - 1), ("down", 0, 2**63 - 1, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            native.pack(part, layer, first, count, rows.data_ptr())


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_peak_is_little_more_than_the_rounded_weights(tmp_path, weight_format, dtype):
    """60 million parameters; measured in a process of its own, less what its imports take."""
    config = ModelConfig(640, 10, 10, 10, 1728, 8000, context=64)
    path = saved(tmp_path / "model", config, dtype)
    peak = fresh_peak_mb(path, weight_format)
    if peak is None:
        pytest.skip("the system does not tell a process its memory")
    rounded = FORMATS[weight_format] * parameter_count(config) / 1e6
    # Beside the weights: pieces of them, and what a first call of some kernels loads.
    assert peak < 1.1 * rounded + 25, (peak, rounded)
