"""Small models for the native engine, and what fp64 says of them."""

import torch

from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.native.engine import Engine
from puna.core.ops import use_backend

SHAPES = [
    ModelConfig(64, 2, 4, 2, 176, vocab_size=97, context=96),  # odd vocabulary: a cut panel
    ModelConfig(24, 3, 3, 3, 40, vocab_size=33, context=40),  # heads of 8, no whole AVX-512 panel
    ModelConfig(48, 1, 12, 4, 64, vocab_size=130, context=64),  # heads of 4
    ModelConfig(128, 1, 1, 1, 20, vocab_size=64, context=140),  # one head of 128
]


def build(config, seed=0):
    model = Transformer(config)
    model.init_weights(seed)
    return model


def exact(model, tokens):
    """Logits after the last of `tokens` (a list), by PyTorch in fp64."""
    wide = Transformer(model.config).double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad(), use_backend("reference"):
        return wide.head_weight @ wide(torch.tensor([tokens]))[0, -1]


def session_of(model, rows, max_tokens, instruction_set=None, weights="fp32"):
    """A session with room, over an engine of its own."""
    session = Engine(model, instruction_set, weight_format=weights).new_session()
    session.reserve(rows, max_tokens)
    return session


def feed(session, sequences, starts=None):
    """Append each sequence to its own row; the logits after each."""
    starts = starts or [0] * len(sequences)
    lengths = torch.tensor([len(s) for s in sequences])
    spans = zip(sequences, starts, strict=True)
    return session.logits(
        torch.tensor([t for s in sequences for t in s]),
        torch.arange(len(sequences)).repeat_interleave(lengths),
        torch.cat([torch.arange(a, a + len(s)) for s, a in spans]),
        lengths.cumsum(0) - 1,
    )
