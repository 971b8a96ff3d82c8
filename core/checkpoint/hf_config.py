"""A model folder's config.json in Hugging Face's terms, both ways.

Written so that transformers 4.3x to 5, vLLM and llama.cpp's converter read them as they are.
What a Llama 2 does not have is refused on reading: ignoring it would compute something else.
"""

import json
from pathlib import Path
from typing import Any

import torch

from puna.core.checkpoint.hf_tokenizer import PAD_ID
from puna.core.config import ModelConfig
from puna.core.tokenizer import Tokenizer

ARCHITECTURES = {"LlamaForCausalLM": "lm", "LlamaForSequenceClassification": "score"}


def config_json(
    config: ModelConfig, head: str, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The contents of config.json; without a tokenizer BOS and EOS are Llama 2's, 1 and 2."""
    document = {
        "architectures": [name for name, kind in ARCHITECTURES.items() if kind == head],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # transformers 4 and llama.cpp
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # 5
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **special_ids(tokenizer),
    }
    if head == "score":
        document["pad_token_id"] = PAD_ID
        document["id2label"] = {"0": "score"}  # one label: num_labels is counted from here
        document["label2id"] = {"score": 0}
    return document


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    """BOS and EOS as config.json and generation_config.json name them."""
    if tokenizer is None:
        return {"bos_token_id": 1, "eos_token_id": 2}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError where it is absent or broken."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a folder that holds a model") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch or save it again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object; fetch or save it again")
    return document


def read_config(path: Path) -> tuple[ModelConfig, str, bool]:
    """(config, head "lm" or "score", whether the head is tied to the embedding) of a config.json.

    Reads the old place of RoPE's base (`rope_theta`) and the new one (`rope_parameters`).
    Raises ValueError for another architecture and for what a Llama 2 does not have.
    """
    document = read_json(path)
    refuse_unsupported(document, path)
    names = document.get("architectures") or ["LlamaForCausalLM"]
    head = ARCHITECTURES[names[0]]
    rope = document.get("rope_parameters") or {}
    try:
        heads = _number(document, "num_attention_heads")
        config = ModelConfig(
            dim=_number(document, "hidden_size"),
            n_layers=_number(document, "num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=_number(document, "num_key_value_heads", heads),
            ffn_dim=_number(document, "intermediate_size"),
            vocab_size=_number(document, "vocab_size"),
            # The last three defaults are transformers' own for a key left out.
            context=_number(document, "max_position_embeddings", 2048),
            norm_eps=float(document.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", document.get("rope_theta", 10000.0))),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    _check_head_dim(document, config, path)
    return config, head, bool(document.get("tie_word_embeddings", False))


def refuse_unsupported(document: dict[str, Any], path: Path) -> None:
    """ValueError for the first setting in config.json that a Llama 2 does not have."""
    model_type = document.get("model_type", "llama")
    names = document.get("architectures") or ["LlamaForCausalLM"]
    if model_type != "llama" or names[0] not in ARCHITECTURES:
        raise ValueError(
            f"{path}: the architecture is {names[0]} ({model_type}); "
            f"Puna reads {' and '.join(ARCHITECTURES)}"
        )
    rope = document.get("rope_parameters") or {}
    scaling = document.get("rope_scaling") or {}
    kinds = {
        kind
        for table in (rope, scaling)
        for kind in (table.get("rope_type"), table.get("type"))
        if kind not in (None, "default")
    }
    found = {
        "rope_scaling": bool(kinds or scaling.get("factor")),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0
        or document.get("partial_rotary_factor", 1.0) != 1.0,
        "attention_bias": bool(document.get("attention_bias")),
        "mlp_bias": bool(document.get("mlp_bias")),
        "hidden_act": document.get("hidden_act", "silu") not in ("silu", "swish"),
        "quantization_config": bool(document.get("quantization_config")),
        "num_labels": names[0] == "LlamaForSequenceClassification" and _labels(document) != 1,
    }
    for name, present in found.items():
        if present:
            value = _labels(document) if name == "num_labels" else document.get(name) or rope
            raise ValueError(
                f"{path}: {name} = {json.dumps(value)} is not what a Llama 2 computes; "
                "use a checkpoint without it"
            )


def _labels(document: dict[str, Any]) -> int:
    """Number of labels, counted as transformers does: two where nothing is said."""
    if document.get("id2label"):
        return len(document["id2label"])
    return int(document.get("num_labels", 2))


def _number(document: dict[str, Any], key: str, default: int | None = None) -> int:
    value = document.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} is {json.dumps(value)}, expected a whole number")
    return value


def _check_head_dim(document: dict[str, Any], config: ModelConfig, path: Path) -> None:
    head_dim = document.get("head_dim")
    if head_dim not in (None, config.head_dim):
        raise ValueError(
            f"{path}: head_dim = {head_dim} where hidden_size / num_attention_heads is "
            f"{config.head_dim}; a Llama 2 has them equal: use another checkpoint"
        )
