"""What vLLM's loader asks of a model folder, as far as it can be said without a GPU and without it:
the architecture it looks up, the settings it reads, and each stored tensor's place in its fused
parameters, of exactly that place's shape, with no place left empty. Its model classes stack q, k
and v in qkv_proj, gate and up in gate_up_proj. (vLLM itself is asked in
test_vllm.py, where it is installed.)

Run: python -m pytest tests/test_vllm_layout.py -q
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_level import byte_level
from safetensors import safe_open

from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import save_model
from puna.core.config import ModelConfig
from puna.core.model import Transformer

transformers = pytest.importorskip("transformers")

KNOWN = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
STACKED = {
    "q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", "gate"), "up_proj": ("gate_up_proj", "up"),
}  # fmt: skip
CONFIG = ModelConfig(64, 3, 4, 2, 96, 280, context=128)
CONFIGS = {
    "plain": CONFIG,
    "wide heads": replace(CONFIG, head_size=32),
    "biases": replace(CONFIG, attention_bias=True),
    "qwen2": replace(CONFIG, qkv_bias=True),
}
Place = tuple[str, str]  # a fused parameter and the part of it; "" is all of it


def places(config: Any) -> dict[Place, tuple[int, ...]]:
    """The shape of every place that the loader fills, from the config as transformers reads it,
    which is how vLLM reads it."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, inner = config.hidden_size, config.intermediate_size
    is_qwen2 = config.model_type == "qwen2"
    bias = is_qwen2 or getattr(config, "attention_bias", False)
    rows = {"q": heads * size, "k": groups * size, "v": groups * size}
    found: dict[Place, tuple[int, ...]] = {
        ("model.embed_tokens.weight", ""): (config.vocab_size, width),
        ("model.norm.weight", ""): (width,),
        ("lm_head.weight", ""): (config.vocab_size, width),
    }
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        for part, count in rows.items():
            found[f"{attention}.qkv_proj.weight", part] = (count, width)
            if bias:
                found[f"{attention}.qkv_proj.bias", part] = (count,)
        found[f"{attention}.o_proj.weight", ""] = (width, heads * size)
        if bias and not is_qwen2:
            found[f"{attention}.o_proj.bias", ""] = (width,)
        for part in ("gate", "up"):
            found[f"{mlp}.gate_up_proj.weight", part] = (inner, width)
        found[f"{mlp}.down_proj.weight", ""] = (width, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{block}.{norm}.weight", ""] = (width,)
    return found


def place_of(name: str) -> Place:
    stem, leaf = name.rsplit(".", 1)
    owner, _, module = stem.rpartition(".")
    if module not in STACKED:
        return name, ""
    fused, part = STACKED[module]
    return f"{owner}.{fused}.{leaf}", part


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of the files that the loader opens: with an index those that
    it names, and each tensor in the file that it names."""
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"] if index.exists() else None
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files == (set(named.values()) if named else {"model.safetensors"})
    found = {}
    for file in sorted(files):
        with safe_open(folder / file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            for name in tensors.keys():  # noqa: SIM118
                assert name not in found and (named is None or named[name] == file)
                view = tensors.get_slice(name)
                found[name] = tuple(view.get_shape()), view.get_dtype()
    assert named is None or named.keys() == found.keys()
    return found


def check(folder: Path, eos: list[int]) -> None:
    said = json.loads((folder / "config.json").read_text())
    (name,) = said["architectures"]
    assert said["model_type"] == KNOWN[name]
    config = transformers.AutoConfig.from_pretrained(folder)
    for key in ("rope_theta", "max_position_embeddings", "rms_norm_eps", "hidden_act"):
        assert said[key]  # vLLM of before transformers 5 reads the base of RoPE here
    assert config.rope_parameters["rope_theta"] == said["rope_theta"]
    expected, tensors = places(config), stored(folder)
    filled = {place_of(name): shape for name, (shape, _) in tensors.items()}
    assert filled == expected and len(filled) == len(tensors)
    short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[said["torch_dtype"]]
    assert {dtype for _, dtype in tensors.values()} == {short}
    assert config.dtype == getattr(torch, said["torch_dtype"])
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert (ends if isinstance(ends, list) else [ends]) == eos
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == eos[0] and len(tokenizer) <= config.vocab_size
    asked = [{"role": "user", "content": "hello"}]
    assert "hello" in tokenizer.apply_chat_template(asked, tokenize=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_its_place(name: str, tmp_path: Path) -> None:
    """One file, several, and another number format; and with several tokens that end an answer."""
    beside = byte_level(tmp_path / "tokenizer")
    (beside / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    model = Transformer(CONFIGS[name])
    model.init_weights(1)
    for folder, most in ((tmp_path / "one", 1 << 30), (tmp_path / "many", 50_000)):
        save_model(folder, model, beside / "tokenizer.json", shard_bytes=most)
        check(folder, [2, 0])
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 2
    convert(tmp_path / "many", tmp_path / "half", dtype=torch.bfloat16)
    check(tmp_path / "half", [2, 0])


def test_what_training_writes(tiny: Path, tmp_path: Path) -> None:
    check(tiny / "chat", [2])
    reward = json.loads((tiny / "helpfulness" / "config.json").read_text())
    assert reward["architectures"] == ["LlamaForSequenceClassification"]
    assert stored(tiny / "helpfulness")["score.weight"][0] == (1, reward["hidden_size"])


def test_a_misplaced_tensor_is_found(tmp_path: Path) -> None:
    """The check itself can fail: another shape than the config says, and a tensor too few."""
    beside = byte_level(tmp_path / "tokenizer")
    model = Transformer(CONFIG)
    model.init_weights(1)
    for key, value in (("num_key_value_heads", 4), ("num_hidden_layers", 4)):
        save_model(tmp_path / "model", model, beside / "tokenizer.json")
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises(AssertionError):
            check(tmp_path / "model", [2])
