"""A model folder's config.json in Hugging Face's terms, both ways.

Written so that transformers 4.3x to 5, vLLM and llama.cpp's converter read them as they are.
What a Llama 2 does not have is refused on reading: ignoring it would compute something else.
"""

from pathlib import Path
from typing import Any

import torch

from puna.core.checkpoint.hf_tokenizer import PAD_ID, pad_id
from puna.core.config import ModelConfig
from puna.core.documents import as_name, field, read_object, shortened, typed
from puna.core.rope_scaling import RopeScaling
from puna.core.text.tokenizer import Tokenizer

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
        "rope_parameters": {**_rope_json(config), "rope_theta": config.rope_theta},  # 5
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **special_ids(tokenizer),
    }
    if config.rope_scaling is not None:
        document["rope_scaling"] = _rope_json(config)  # transformers 4
    if head == "score":
        document["pad_token_id"] = PAD_ID if tokenizer is None else pad_id(tokenizer)
        document["id2label"] = {"0": "score"}  # one label: num_labels is counted from here
        document["label2id"] = {"score": 0}
    return document


def _rope_json(config: ModelConfig) -> dict[str, Any]:
    """What is said of RoPE but for its base."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default"}
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return scaling._asdict()


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | list[int]]:
    """BOS and EOS, one or several, as config.json and generation_config.json name them."""
    if tokenizer is None:
        return {"bos_token_id": 1, "eos_token_id": 2}
    ends = list(tokenizer.eos_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def read_config(path: Path) -> tuple[ModelConfig, str, bool]:
    """(config, head "lm" or "score", whether the head is tied to the embedding) of a config.json.

    Reads the old places of RoPE's base (`rope_theta`, `rope_scaling`) and the new one
    (`rope_parameters`). Raises ValueError for another architecture, for what a Llama 2 does not
    have and for a field of another type than it must have.
    """
    document = read_object(path, "no such file; give a folder that holds a model")
    try:
        name = architecture(document)
        rope = rope_table(document)
        refuse_unsupported(document, name, rope)
        heads = field(document, "num_attention_heads", int)
        config = ModelConfig(
            dim=field(document, "hidden_size", int),
            n_layers=field(document, "num_hidden_layers", int),
            n_heads=heads,
            n_kv_heads=field(document, "num_key_value_heads", int, heads),
            ffn_dim=field(document, "intermediate_size", int),
            vocab_size=field(document, "vocab_size", int),
            # The last three defaults are transformers' own for a key left out.
            context=field(document, "max_position_embeddings", int, 2048),
            norm_eps=field(document, "rms_norm_eps", float, 1e-6),
            rope_theta=field(rope, "rope_theta", float, None)
            or field(document, "rope_theta", float, 10000.0),
            rope_scaling=_rope_scaling(rope),
            head_size=field(document, "head_dim", int, None),
            attention_bias=field(document, "attention_bias", bool, False),
        )
        return config, ARCHITECTURES[name], field(document, "tie_word_embeddings", bool, False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def architecture(document: dict[str, Any]) -> str:
    """The first of the architectures; ValueError where Puna has none of that name."""
    model_type = field(document, "model_type", str, "llama")
    names = field(document, "architectures", list, None) or ["LlamaForCausalLM"]
    name = typed(names[0], str, "architectures[0]")
    if model_type != "llama" or name not in ARCHITECTURES:
        raise ValueError(
            f"the architecture is {as_name(name)} ({as_name(model_type)}); Puna reads "
            f"{' and '.join(ARCHITECTURES)}"
        )
    return name


def rope_table(document: dict[str, Any]) -> dict[str, Any]:
    """What is said of RoPE; where both are there `rope_scaling` counts, as in transformers."""
    new = field(document, "rope_parameters", dict, {})
    return field(document, "rope_scaling", dict, {}) or new


def _rope_type(rope: dict[str, Any]) -> str:
    """How the context was stretched; older files say it in `type`, "default" is not at all."""
    kinds = {field(rope, key, str, "default") for key in ("rope_type", "type")} - {"default"}
    if len(kinds) > 1 or (not kinds and rope.get("factor")):
        return "unknown"
    return kinds.pop() if kinds else "default"


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = _rope_type(rope)
    if kind == "linear":
        return RopeScaling("linear", field(rope, "factor", float))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            field(rope, "factor", float),
            field(rope, "low_freq_factor", float),
            field(rope, "high_freq_factor", float),
            field(rope, "original_max_position_embeddings", int),
        )
    return None


def refuse_unsupported(document: dict[str, Any], name: str, rope: dict[str, Any]) -> None:
    """ValueError for the first setting of architecture `name` that a Llama 2 does not have."""
    found = {
        "rope_scaling": _rope_type(rope) not in ("default", "linear", "llama3"),
        "partial_rotary_factor": field(rope, "partial_rotary_factor", float, 1.0) != 1.0
        or field(document, "partial_rotary_factor", float, 1.0) != 1.0,
        "mlp_bias": field(document, "mlp_bias", bool, False),
        "hidden_act": field(document, "hidden_act", str, "silu") not in ("silu", "swish"),
        "quantization_config": bool(document.get("quantization_config")),
        "num_labels": name == "LlamaForSequenceClassification" and _labels(document) != 1,
    }
    for key, present in found.items():
        if present:
            value = _labels(document) if key == "num_labels" else document.get(key) or rope
            raise ValueError(
                f"{key} = {shortened(value)} is not what a Llama 2 computes; use a checkpoint "
                "without it"
            )


def _labels(document: dict[str, Any]) -> int:
    """Number of labels, counted as transformers does: two where nothing is said."""
    if labels := field(document, "id2label", dict, {}):
        return len(labels)
    return field(document, "num_labels", int, 2)
