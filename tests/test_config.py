"""Run: python -m pytest tests/test_config.py -q"""

import dataclasses

import pytest
import torch

from puna.core.config import SIZES, ModelConfig, ffn_width, parameter_count, size
from puna.core.model import Transformer

# As in Meta's and Hugging Face's releases (34b: Code Llama 34B's shape with 32,000 pieces).
COUNTS = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "34b": 33_743_970_304,
    "70b": 68_976_648_192,
    "15m": 24_407_712,  # llama2.c's stories15M and its untied head of 288 x 32,000
}
FIELDS = [
    {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "ffn_dim": 11008},
    {"dim": 5120, "n_layers": 40, "n_heads": 40, "n_kv_heads": 40, "ffn_dim": 13824},
    {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8, "ffn_dim": 22016},
    {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "ffn_dim": 28672},
]
SMALL = ModelConfig(16, 2, 4, 2, 24, vocab_size=11)


def on_meta(config):
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    """The module as built and the formula both give the literal; nothing is allocated."""
    model = on_meta(size(name))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert parameter_count(size(name)) == COUNTS[name]


@pytest.mark.parametrize(("name", "fields"), list(zip(COUNTS, FIELDS, strict=False)))
def test_the_papers_sizes(name, fields):
    config = dataclasses.asdict(size(name))
    assert config == {
        **fields,
        "vocab_size": 32000,
        "context": 4096,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "head_size": None,
        "attention_bias": False,
        "qkv_bias": False,
    }


@pytest.mark.parametrize("name", SIZES)
def test_the_formula_counts_every_size(name):
    counted = sum(p.numel() for p in on_meta(SIZES[name]).parameters())
    assert parameter_count(SIZES[name]) == counted


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),  # 70B's params.json
        (8192, 256, None, 22016),
        (288, 32, None, 768),  # llama2.c
    ],
)
def test_ffn_width_of_metas_fields(dim, multiple_of, multiplier, width):
    assert ffn_width(dim, multiple_of, multiplier) == width


def test_unknown_size():
    with pytest.raises(ValueError, match="unknown model size '8b'; known sizes: 7b, 13b"):
        size("8b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 18}, "dim 18 must be a multiple of n_heads 4"),
        ({"n_kv_heads": 3}, "n_heads 4 must be a multiple of n_kv_heads 3"),
        ({"dim": 12}, "head size 3 must be even"),
        ({"n_layers": 0}, "n_layers is 0; it must be at least 1"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_shapes_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.dim = 32
