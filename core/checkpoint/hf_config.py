"""A model folder's config.json in Hugging Face's terms, both ways.

Written so that transformers 4.3x to 5, vLLM and llama.cpp's converter read them as they are.
What a Llama 2 does not have is refused on reading: ignoring it would compute something else.
Qwen2 is a Llama whose q, k and v have biases, and is written as one; Mistral is a Llama where the
context is no longer than its window, and is written as Llama.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from puna.core.checkpoint.hf_tokenizer import PAD_ID, pad_id
from puna.core.config import ModelConfig
from puna.core.documents import as_name, field, read_object, shortened, typed
from puna.core.rope_scaling import FIELDS, RopeScaling, yarn_attention
from puna.core.text.tokenizer import Tokenizer

HEADS = {"ForCausalLM": "lm", "ForSequenceClassification": "score"}


class Family(NamedTuple):
    """What transformers takes where a config.json leaves a key out."""

    name: str  # before ForCausalLM
    context: int
    kv_heads: int | None  # None: as many as heads
    window: int | None = None


FAMILIES = {
    "llama": Family("Llama", 2048, None),
    "qwen2": Family("Qwen2", 32768, 32, window=4096),
    "mistral": Family("Mistral", 131072, 8, window=4096),
}


def config_json(
    config: ModelConfig, head: str, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The contents of config.json; without a tokenizer BOS and EOS are Llama 2's, 1 and 2."""
    family = "qwen2" if config.qkv_bias else "llama"
    ending = next(name for name, kind in HEADS.items() if kind == head)
    document = {
        "architectures": [FAMILIES[family].name + ending],
        "model_type": family,
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
    return {"rope_type": "default"} if scaling is None else scaling.settings()


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
        family, head = architecture(document)
        rope = rope_table(document)
        refuse_unsupported(document, head, rope)
        heads = field(document, "num_attention_heads", int)
        config = ModelConfig(
            dim=field(document, "hidden_size", int),
            n_layers=field(document, "num_hidden_layers", int),
            n_heads=heads,
            n_kv_heads=field(document, "num_key_value_heads", int, family.kv_heads or heads),
            ffn_dim=field(document, "intermediate_size", int),
            vocab_size=field(document, "vocab_size", int),
            # The defaults are transformers' own for a key left out.
            context=field(document, "max_position_embeddings", int, family.context),
            norm_eps=field(document, "rms_norm_eps", float, 1e-6),
            rope_theta=field(rope, "rope_theta", float, None)
            or field(document, "rope_theta", float, 10000.0),
            rope_scaling=_rope_scaling(rope, document, family),
            head_size=field(document, "head_dim", int, None),
            # Only Llama has this key: Qwen2 always has biases, and Mistral never.
            attention_bias=family.name == "Llama"
            and field(document, "attention_bias", bool, False),
            qkv_bias=family.name == "Qwen2",
        )
        _refuse_window(document, family, config.context)
        return config, head, field(document, "tie_word_embeddings", bool, False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def architecture(document: dict[str, Any]) -> tuple[Family, str]:
    """The model's family and its head, "lm" or "score", of the first of the architectures;
    ValueError where Puna has none of that name."""
    model_type = field(document, "model_type", str, "llama")
    family = FAMILIES.get(model_type)
    default = f"{(family or FAMILIES['llama']).name}ForCausalLM"
    names = field(document, "architectures", list, None) or [default]
    name = typed(names[0], str, "architectures[0]")
    heads = {family.name + ending: head for ending, head in HEADS.items()} if family else {}
    if family is None or name not in heads:
        raise ValueError(
            f"the architecture is {as_name(name)} ({as_name(model_type)}); Puna reads "
            f"{', '.join(each.name for each in FAMILIES.values())}, each {' or '.join(HEADS)}"
        )
    return family, heads[name]


def rope_table(document: dict[str, Any]) -> dict[str, Any]:
    """What is said of RoPE; where both are there `rope_scaling` counts, as in transformers, and
    the context that came first counts where it stands outside."""
    new = field(document, "rope_parameters", dict, {})
    rope = field(document, "rope_scaling", dict, {}) or new
    first = "original_max_position_embeddings"
    return {**rope, first: document[first]} if rope and document.get(first) else rope


def _rope_type(rope: dict[str, Any]) -> str:
    """How the context was stretched; older files say it in `type`, "default" is not at all."""
    kinds = {field(rope, key, str, "default") for key in ("rope_type", "type")} - {"default"}
    if len(kinds) > 1 or (not kinds and rope.get("factor")):
        return "unknown"
    return kinds.pop() if kinds else "default"


def _rope_scaling(
    rope: dict[str, Any], document: dict[str, Any], family: Family
) -> RopeScaling | None:
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
    if kind == "yarn":
        factor = field(rope, "factor", float)
        scales = (field(rope, name, float, None) for name in ("mscale", "mscale_all_dim"))
        context = field(document, "max_position_embeddings", int, family.context)
        return RopeScaling(
            "yarn",
            factor,
            original_max_position_embeddings=field(
                rope, "original_max_position_embeddings", int, context
            ),
            attention_factor=field(
                rope, "attention_factor", float, yarn_attention(factor, *scales)
            ),
            beta_fast=field(rope, "beta_fast", float, 32.0),
            beta_slow=field(rope, "beta_slow", float, 1.0),
            truncate=field(rope, "truncate", bool, True),
        )
    return None


def _refuse_window(document: dict[str, Any], family: Family, context: int) -> None:
    """ValueError where a token may be so far back that the family does not look at it."""
    if family.window is None:
        return
    if family.name == "Qwen2" and not field(document, "use_sliding_window", bool, False):
        return
    absent = None if "sliding_window" in document else family.window
    window = field(document, "sliding_window", int, absent)
    if window is not None and window < context:
        raise ValueError(
            f"sliding_window is {window}, and Puna looks at all of a context of {context} tokens; "
            f"set max_position_embeddings to {window}: so far both are the same"
        )


def refuse_unsupported(document: dict[str, Any], head: str, rope: dict[str, Any]) -> None:
    """ValueError for the first setting of a model with this head that a Llama 2 does not have."""
    if _rope_type(rope) == "dynamic":
        raise ValueError(
            "rope_scaling of the type dynamic turns earlier tokens anew as a text grows, which "
            "Puna does not; leave rope_scaling out: up to max_position_embeddings tokens the model "
            "is the same"
        )
    found = {
        "rope_scaling": _rope_type(rope) not in ("default", *FIELDS),
        "partial_rotary_factor": field(rope, "partial_rotary_factor", float, 1.0) != 1.0
        or field(document, "partial_rotary_factor", float, 1.0) != 1.0,
        "mlp_bias": field(document, "mlp_bias", bool, False),
        "hidden_act": field(document, "hidden_act", str, "silu") not in ("silu", "swish"),
        "quantization_config": bool(document.get("quantization_config")),
        "num_labels": head == "score" and _labels(document) != 1,
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
