"""Heads of a size of their own and attention with biases: transformers' numbers, every format."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puna.core import ops
from puna.core.checkpoint.any_format import open_any
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model, save_model
from puna.core.config import ModelConfig, parameter_count
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.native.engine import Engine, instruction_sets, unfit
from puna.core.native.loader import extension
from puna.core.parameters import parameter_shapes
from puna.core.text.tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")

PLAIN = ModelConfig(48, 2, 4, 2, 64, 330, context=128)
CONFIGS = {
    "wide heads": replace(PLAIN, head_size=32),
    "narrow heads": replace(PLAIN, head_size=8),
    "biases": replace(PLAIN, dim=64, attention_bias=True),
    "both": replace(PLAIN, head_size=16, attention_bias=True),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Transformer:
    """Random weights, biases and norms that are not what they begin with."""
    made = Transformer(CONFIGS[request.param])
    made.init_weights(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all()
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return made


def tokens() -> torch.Tensor:
    return torch.randint(3, 330, (2, 60), generator=torch.Generator().manual_seed(5))


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    if isinstance(model, Transformer):
        return model.logits(model(ids))
    return model(ids).logits


def test_logits_and_gradients_are_transformers(model: Transformer, tmp_path: Path) -> None:
    save_model(tmp_path / "model", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = tokens()
    ours, peers = logits(model, ids), logits(theirs, ids)
    assert (ours - peers).abs().max() < 1e-4
    for found in (ours, peers):
        found.square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        assert (parameter.grad - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-7, name
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.config == model.config
    assert torch.equal(logits(again, ids), ours)


def test_generation_is_transformers_with_the_engine_or_without(
    model: Transformer, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    theirs.generation_config.eos_token_id = None
    prompt = [1, 5, 9, 200]
    wanted = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0
    )[0, 4:].tolist()
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            found = generate(model, [prompt], max_new_tokens=40, eos_id=None, temperature=0.0)
        assert found[0].tokens == wanted, backend
    assert unfit(model) is None


@pytest.mark.skipif(extension() is None, reason="the extension is not built")
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_the_engine_multiplies_and_adds_as_the_model(
    model: Transformer, weights: str, tmp_path: Path
) -> None:
    """A prompt at once and token by token, on every instruction set; also read from a folder."""
    save_model(tmp_path / "model", model)
    ids = tokens()[0]
    with torch.no_grad(), ops.use_backend("reference"):
        expected = logits(model, ids[None])[0]
    places, row = torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.int64)
    for name in instruction_sets(model.config.head_dim):
        read = Engine.read(open_any(tmp_path / "model"), weights, name)
        for engine in (Engine(model, name, weight_format=weights), read):
            with engine.session(1, len(ids)) as session:
                found = session.logits(ids, row, places, places)
                each = [
                    session.logits(*(x[t : t + 1] for x in (ids, row, places)), row[:1])
                    for t in range(len(ids))
                ]
            error = (found - expected).norm() / expected.norm()
            assert error < {"fp32": 1e-5, "bf16": 2e-2, "int8": 4e-2}[weights], (name, error)
            torch.testing.assert_close(torch.cat(each), found, atol=1e-5, rtol=1e-5)


def test_a_bias_that_the_config_has_not_is_no_engines(model: Transformer) -> None:
    size = model.config.dim
    model.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(size))
    assert "mlp.down_proj, it has a bias" in str(unfit(model))


def test_shapes_are_counted_as_they_are(model: Transformer) -> None:
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes = parameter_shapes(model.config, "lm")
    assert list(shapes.items()) == list(found.items())  # in the model's order, too
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


def test_gguf_there_and_back(model: Transformer, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    texts = ["[INST] hello there [/INST] general answer", "<<SYS>> be kind <</SYS>> 7 times"] * 20
    tokenizer = tmp_path / "tokenizer.model"
    train_tokenizer(texts, tokenizer, vocab_size=330)
    save_model(tmp_path / "model", model, tokenizer)
    file = convert(tmp_path / "model", tmp_path / "m.gguf")
    back = load_model(file)
    assert back.config == model.config
    for (name, one), other in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(one, other), name
    # llama.cpp's names and its order of rows: adjacent pairs of a head, in a bias, too
    stored = {each.name: each for each in gguf.GGUFReader(file).tensors}
    if model.config.attention_bias:
        heads, size = model.config.n_kv_heads, model.config.head_dim
        ours = model.model.layers[1].self_attn.k_proj.bias.detach().view(heads, size)
        theirs = torch.from_numpy(stored["blk.1.attn_k.bias"].data.copy()).view(heads, size)
        assert torch.equal(theirs[:, 0::2], ours[:, : size // 2])
        assert torch.equal(theirs[:, 1::2], ours[:, size // 2 :])
        assert {"blk.0.attn_q.bias", "blk.0.attn_v.bias", "blk.0.attn_output.bias"} <= set(stored)
    fields = gguf.GGUFReader(file).fields
    if model.config.head_size:
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            assert fields[f"llama.{key}"].contents() == model.config.head_size


def test_what_cannot_hold_them_says_so(tmp_path: Path) -> None:
    for name, value in (("head_size", 32), ("attention_bias", True)):
        config = replace(PLAIN, **{name: value})
        save_model(tmp_path / name, Transformer(config))
        with pytest.raises(ValueError, match=f"a llama2.c .bin cannot hold {name}; write a model"):
            convert(tmp_path / name, tmp_path / "m.bin")
        assert not (tmp_path / "m.bin").exists()


def test_heads_need_not_divide_the_width(tmp_path: Path) -> None:
    """A folder that transformers refuses, and Puna and llama.cpp do not."""
    config = replace(PLAIN, dim=50, head_size=8)
    save_model(tmp_path / "model", Transformer(config))
    assert load_model(tmp_path / "model").config == config


def test_a_head_size_that_says_nothing_new_is_none() -> None:
    assert replace(PLAIN, head_size=12) == PLAIN
    assert json.dumps(vars(replace(PLAIN, head_size=12))) == json.dumps(vars(PLAIN))
    with pytest.raises(ValueError, match="head size 5 must be even"):
        replace(PLAIN, head_size=5)
