"""A Llama of transformers with the weights of ours."""

from typing import Any

import pytest

from puna.core.model import Transformer


def in_transformers(model: Transformer) -> Any:
    """The same weights in transformers' Llama."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer
