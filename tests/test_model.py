"""Run: python -m pytest tests/test_model.py -q"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_peer import in_transformers

from puna.core.checkpoint.source import fresh
from puna.core.config import SIZES, ModelConfig
from puna.core.generation.kv_cache import KVCache
from puna.core.model import Transformer

MHA = ModelConfig(24, 2, 4, 4, 40, vocab_size=29, context=20)
GQA = ModelConfig(32, 3, 4, 2, 44, vocab_size=37, context=20, norm_eps=1e-3, rope_theta=500.0)


def make(config=GQA, head="lm", seed=0):
    model = Transformer(config, head=head)
    model.init_weights(seed)
    return model


def random_tokens(*shape, config=GQA, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


@pytest.mark.parametrize("config", [MHA, GQA], ids=["mha", "gqa"])
def test_logits_and_gradients_are_those_of_transformers(config):
    model = make(config)
    peer = in_transformers(model)
    tokens = random_tokens(2, 13, config=config)
    upstream = torch.randn(2, 13, config.vocab_size)
    ours, theirs = model.logits(model(tokens)), peer(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.backward(upstream)
    theirs.backward(upstream)
    expected = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.pop(name).grad, rtol=1e-3, atol=1e-4)
    assert not expected


@settings(max_examples=10)
@given(
    rows=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
def test_packed_rows_equal_separate_sequences(rows, seed):
    longest = max(map(sum, rows))
    rows = [lengths + [longest - sum(lengths)] * (longest > sum(lengths)) for lengths in rows]
    config = ModelConfig(32, 3, 4, 2, 44, vocab_size=37, context=longest)
    model, tokens = make(config), random_tokens(len(rows), longest, seed=seed)
    lengths = [n for row in rows for n in row]
    positions = torch.cat([torch.arange(n) for n in lengths]).view_as(tokens)
    cuts = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = model(tokens, positions, cuts).flatten(0, 1).split(lengths)
    separate = tokens.flatten().split(lengths)
    for found, ids in zip(packed, separate, strict=True):
        torch.testing.assert_close(found, model(ids[None])[0], rtol=1e-4, atol=1e-5)


def test_what_follows_does_not_change_what_came_before():
    model, tokens = make(), random_tokens(2, 9)
    hidden = model(tokens)
    tokens[:, 6:] = 0
    torch.testing.assert_close(model(tokens)[:, :6], hidden[:, :6])
    assert not torch.allclose(model(tokens)[:, 6:], hidden[:, 6:])


@pytest.mark.parametrize("first", [1, 5])
def test_with_a_cache_as_without(first):
    """Fill with the first tokens, then one at a time: the same hidden states."""
    model, tokens = make(), random_tokens(3, 9)
    whole = model(tokens)
    cache = KVCache(GQA, batch=3, max_tokens=9)
    parts = [model(tokens[:, :first], cache=cache)]
    cache.lengths += first
    for t in range(first, 9):
        parts.append(model(tokens[:, t : t + 1], cache.lengths[:, None], cache=cache))
        cache.lengths += 1
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_rows_of_different_lengths_in_one_cache():
    model, tokens = make(), random_tokens(3, 9)
    lengths = torch.tensor([2, 6, 4])
    cache = KVCache(GQA, batch=3, max_tokens=10)
    model(tokens[:, :6], cache=cache)  # each row right-padded to six with whatever stands there
    cache.lengths = lengths
    new = random_tokens(3, 1, seed=1)
    found = model(new, lengths[:, None], cache=cache)
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat((tokens[row, :length], new[row]))[None]
        torch.testing.assert_close(found[row, 0], model(alone)[0, -1], rtol=1e-4, atol=1e-5)


def test_beyond_the_context():
    model = make()
    with pytest.raises(ValueError, match="21 tokens exceeds the model's context of 20"):
        model(random_tokens(1, 21))
    positions = torch.tensor([[0, 1, 20]])
    with pytest.raises(ValueError, match="a sequence of 21 tokens exceeds"):
        model(random_tokens(1, 3), positions)
    cuts = torch.tensor([0, 15, 40], dtype=torch.int32)
    packed = torch.cat((torch.arange(15), torch.arange(25)))[None]
    with pytest.raises(ValueError, match="a sequence of 25 tokens exceeds"):
        model(random_tokens(1, 40), packed, cuts)


def test_packing_may_fill_more_than_the_context():
    """The context limits a sequence, not a row: a batch of pairs is one long row."""
    lengths = [20, 20, 7]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cuts = torch.tensor([0, 20, 40, 47], dtype=torch.int32)
    assert make()(random_tokens(1, 47), positions, cuts).shape == (1, 47, GQA.dim)


def test_score_head():
    model = make(head="score")
    hidden = model(random_tokens(2, 5))
    scores = model.logits(hidden)
    assert scores.shape == (2, 5, 1) and model.head_weight.shape == (1, GQA.dim)
    torch.testing.assert_close(scores[..., 0], (hidden * model.score.weight[0]).sum(-1))
    assert "lm_head.weight" not in model.state_dict()
    with pytest.raises(ValueError, match="expected 'lm' or 'score'"):
        Transformer(GQA, head="value")


@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48), (2, 48)])
def test_a_large_head_for_one_row_as_for_many(shape):
    model = Transformer(ModelConfig(48, 1, 2, 2, 16, vocab_size=32 * 1400))
    torch.manual_seed(0)
    hidden = torch.randn(shape)
    logits = model.logits(hidden)
    assert logits.shape == (*shape[:-1], 32 * 1400) and logits.dtype == torch.float32
    exact = hidden.double() @ model.head_weight.double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["lm", "score"])
def test_every_weight_is_initialised_as_the_table_says(head):
    config = ModelConfig(128, 3, 4, 2, 352, vocab_size=500)
    with torch.device("meta"):
        model = Transformer(config, head=head)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.init_weights(seed=3)
    residual = 1 / math.sqrt(2 * 3)
    stds = {
        "embed_tokens": 0.5,
        "q_proj": 128**-0.5,
        "k_proj": 128**-0.5,
        "v_proj": 128**-0.5,
        "o_proj": 128**-0.5 * residual,
        "gate_proj": 128**-0.5,
        "up_proj": 128**-0.5,
        "down_proj": 352**-0.5 * residual,
        "lm_head": 0.02,
        "score": 129**-0.5,
    }
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in stds:
            spread = 4 / math.sqrt(2 * parameter.numel())  # four standard errors
            assert parameter.std().item() == pytest.approx(stds[kind], rel=spread), name
            assert abs(parameter.mean().item()) < 4 * stds[kind] / math.sqrt(parameter.numel())
        else:
            assert (parameter == 1).all(), name


def test_initialisation_is_the_seeds():
    first, again, other = make(seed=5), make(seed=5), make(seed=6)
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    for a, b, c in pairs:
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)


def test_parameter_names_are_hugging_faces():
    names = set(make(MHA).state_dict())
    layer = "model.layers.1."
    assert {name for name in names if name.startswith(layer)} == {
        layer + rest + ".weight"
        for rest in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    outside = {name for name in names if ".layers." not in name}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_training_after_inference_mode():
    """The RoPE tables made on first use in inference mode must serve autograd afterwards."""
    model, tokens = make(), random_tokens(2, 5)
    with torch.inference_mode():
        model(tokens)
    model(tokens, torch.arange(5).expand(2, 5)).sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("head", ["lm", "score"])
def test_weights_drawn_on_a_device(head, device):
    """A model's own, in its order, each of its scale; on the CPU those of `init_weights`."""
    config = SIZES["mini"]
    model = make(config, head, seed=1)
    found = dict(fresh(config, 1, head, device).tensors())
    assert list(found) == [name for name, _ in model.named_parameters()]
    again = dict(fresh(config, 1, head, device).tensors())
    for name, wanted in model.named_parameters():
        tensor = found[name]
        assert tensor.shape == wanted.shape and tensor.dtype == torch.float32
        assert tensor.device.type == device and torch.equal(tensor, again[name])
        if device == "cpu" or tensor.ndim == 1:
            assert torch.equal(tensor.cpu(), wanted)
        else:
            assert float(tensor.std()) == pytest.approx(float(wanted.std()), rel=0.15)
