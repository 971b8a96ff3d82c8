"""Sizes are counted before anything is built, and every field has the type that it must have: a
lying number is one sentence, at once, and costs no memory."""

import json
import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.core.checkpoint.any_format import open_any
from puna.core.checkpoint.folder import load_model, save_model
from puna.core.config import ModelConfig, parameter_count
from puna.core.model import Transformer
from puna.core.parameters import parameter_shapes
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data.corpus import open_corpus
from puna.trainers.rl.best_of import read_samples
from puna.trainers.train.recipes import read_toml

SHAPES = [ModelConfig(24, 2, 2, 1, 36, 64, context=32), ModelConfig(64, 3, 8, 4, 40, 100)]


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("head", ["lm", "score"])
def test_counted_shapes_are_the_models(config: ModelConfig, head: str) -> None:
    model = Transformer(config, head)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(parameter_shapes(config, head).items()) == list(built.items())
    if head == "lm":
        assert parameter_count(config) == sum(p.numel() for p in model.parameters())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = Transformer(SHAPES[0])
    model.init_weights()
    save_model(tmp_path / "hf", model)
    return tmp_path / "hf"


@pytest.fixture
def meta_folder(tmp_path: Path) -> Path:
    """Enough of Meta's format for its params.json to be read."""
    (tmp_path / "meta").mkdir()
    share = {"tok_embeddings.weight": torch.ones(64, 24), "norm.weight": torch.ones(24)}
    share |= {f"layers.{layer}.attention.wq.weight": torch.ones(24, 24) for layer in range(2)}
    torch.save(share, tmp_path / "meta" / "consolidated.00.pth")
    return tmp_path / "meta"


def edited(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | changes))


def refused(read, message: str) -> None:
    """`read` ends in a ValueError within a few MB, and without seconds of work: a header that was
    believed took minutes. (A second by the clock where nothing else runs.)"""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            read()
        assert time.process_time() - began < 10
        assert tracemalloc.get_traced_memory()[1] < 20e6
        assert "\n" not in str(caught.value)
    finally:
        tracemalloc.stop()


BAD_CONFIGS = [
    ({"num_hidden_layers": 10**9}, "config says 1,000,000,000 layers, the weights have 2; fetch"),
    ({"num_hidden_layers": 3}, "config says 3 layers, the weights have 2"),
    ({"num_hidden_layers": 10**30}, "layers, the weights have 2"),
    ({"max_position_embeddings": 10**9}, "the context is 1000000000 tokens; .* at most 1048576"),
    ({"vocab_size": 10**12}, "embed_tokens.weight has shape"),
    ({"hidden_size": 2.5}, "hidden_size is 2.5, expected a whole number"),
    ({"hidden_size": True}, "hidden_size is true, expected a whole number"),
    ({"architectures": 3}, "architectures is 3, expected a list"),
    ({"architectures": [[]]}, r"architectures\[0\] is \[\], expected a text"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is .*, expected a list"),
    ({"rope_parameters": "x"}, 'rope_parameters is "x", expected an object'),
    ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
    ({"rope_parameters": {"rope_type": []}}, "rope_type is .*, expected a text"),
    ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is .*, expected a finite number"),
    ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta is Infinity, expected a"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, expected a finite number"),
    ({"rms_norm_eps": -1.0}, "norm_eps is -1.0; it must be above 0"),
    ({"id2label": 5}, "id2label is 5, expected an object"),
    ({"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no", expected true or false'),
    ({"attention_bias": "no"}, 'attention_bias is "no", expected true or false'),
    ({"hidden_act": 3}, "hidden_act is 3, expected a text"),
    ({"model_type": []}, r"model_type is \[\], expected a text"),
    ({"head_dim": "12"}, 'head_dim is "12", expected a whole number'),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_config_json(changes: dict, message: str, folder: Path) -> None:
    edited(folder / "config.json", **changes)
    if "id2label" in changes:
        edited(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    refused(lambda: open_any(folder), message)


BAD_PARAMS = [
    ({"n_layers": 1e30}, r"n_layers is 1e\+30, expected a whole number"),
    ({"n_layers": 10**30}, "layers, the weights have 2"),
    ({"n_layers": float("inf")}, "n_layers is Infinity, expected a whole number"),
    ({"norm_eps": float("inf")}, "norm_eps is Infinity, expected a finite number"),
    ({"multiple_of": 0}, "multiple_of is 0 and ffn_dim_multiplier None; both must be above 0"),
    ({"multiple_of": -4}, "multiple_of is -4"),
    ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier -1.0; both must be above 0"),
    ({"ffn_dim_multiplier": 1e308}, "ffn_dim_multiplier 1e.308; both must be above 0, the second"),
    ({"ffn_dim_multiplier": "x"}, 'ffn_dim_multiplier is "x", expected a finite number'),
    ({"dim": "24"}, 'dim is "24", expected a whole number'),
    ({"vocab_size": None, "dim": [24]}, r"dim is \[24\], expected a whole number"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_PARAMS)
def test_params_json(changes: dict, message: str, meta_folder: Path) -> None:
    edited(meta_folder / "params.json", **{"dim": 24, "n_layers": 2, "n_heads": 2} | changes)
    refused(lambda: open_any(meta_folder), message)


@pytest.mark.parametrize("layers", [2**31 - 1, 10**6, 3])
def test_llama2c_header(layers: int, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(struct.pack("<7i", 24, 36, layers, 2, 1, 64, 32) + b"\0" * 100)
    refused(lambda: open_any(file), "is 128 bytes long, its header asks for")


def test_shards_that_are_not_there(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = {f"model.layers.{n}.mlp.up_proj.weight": f"model-{n}.safetensors" for n in range(9999)}
    edited(folder / "model.safetensors.index.json", weight_map=names)
    refused(lambda: open_any(folder), "model-0.safetensors: the file is missing; fetch")
    for wrong in ([], {}, {"a": ["b"]}, "x"):
        edited(folder / "model.safetensors.index.json", weight_map=wrong)
        refused(lambda: open_any(folder), "no weight_map|is missing|expected a text")


DOCUMENTS = {
    "deep": (b"[" * 200_000, "config.json: the JSON is nested too deeply; fetch"),
    "digits": (b'{"a": 1' + b"0" * 5000 + b"}", "config.json: a number has more than 4,300 digits"),
    "bytes": (b'{\n"a": "\xff"}', "config.json:2: not UTF-8"),
    "list": (b"[]", "config.json must hold a JSON object"),
    "empty": (b"", "config.json: not JSON .*column 1"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents(kind: str, folder: Path) -> None:
    data, message = DOCUMENTS[kind]
    (folder / "config.json").write_bytes(data)
    refused(lambda: open_any(folder), message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_pipe_is_no_file(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(lambda: open_any(folder), f"{name} is a pipe or a device, expected a regular file")


def test_a_pipe_is_no_share_of_metas(meta_folder: Path) -> None:
    (meta_folder / "consolidated.00.pth").unlink()
    refused(lambda: open_any(meta_folder), "no such model|no such file")
    edited(meta_folder / "params.json", dim=24)
    os.mkfifo(meta_folder / "consolidated.00.pth")
    refused(lambda: open_any(meta_folder), "consolidated.00.pth is a pipe or a device")


def test_a_pipe_is_only_data(tiny: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    readers = [read_samples, read_toml, Tokenizer, open_any]  # rows and texts: test_brought.py
    for read in [*readers, lambda path: open_corpus([path], tokenizer)]:
        refused(lambda read=read: read(tmp_path / "pipe.txt"), "pipe.txt")


def test_corpora(tiny: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    file = tmp_path / "a.npy"
    np.save(file, np.ones(8, np.uint16))
    data = file.read_bytes()
    for shape in (b"(9,), ", b"(0x8ffff,), ", b"(-1,), ", b"('x',), ", b"((8,),), "):
        header = data[:128].replace(b"(8,), ", shape).rstrip() + b"\n"
        file.write_bytes(header.replace(b"\n", b"").ljust(127) + b"\n" + data[128:])
        refused(lambda: open_corpus([file], tokenizer), "a.npy is no .npy array")
    np.savez(tmp_path / "b.npz", np.ones(8, np.uint16))
    (tmp_path / "b.npz").rename(file)
    refused(lambda: open_corpus([file], tokenizer), "a.npy is no .npy array")


RECIPES = {
    "parts": (b"a" + b".a" * 20_000 + b" = 1", ":1: a key of 20,001 parts"),
    "quoted": (b'x = 1\n"a"' + b'."a"' * 20_000 + b" = 1", ":2: a key of 20,001 parts"),
    "inline": (b"x = {a" + b".a" * 20_000 + b" = 1}", ":1: a key of 20,001 parts"),
    "deep": (b"a = " + b"[" * 50_000, "the TOML is nested too deeply"),
    "digits": (b"lr = 1" + b"0" * 5000, "a number has more than 4,300 digits"),
    "bytes": (b"a = 1\nb = '\xff'", ":2: not UTF-8"),
    "long": (b"#" * (1 << 21), "has 2,097,152 bytes, which no recipe needs"),
    "syntax": (b"a = 1\nb = ]\n", r"not TOML: .*line 2"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(kind: str, tmp_path: Path) -> None:
    data, message = RECIPES[kind]
    (tmp_path / "r.toml").write_bytes(data)
    refused(lambda: read_toml(tmp_path / "r.toml"), message)
    path = ", ".join(f'"{n}.{"." * 100}.jsonl"' for n in range(99))  # dots in texts are no parts
    (tmp_path / "r.toml").write_text(f"data = [{path}]\n")
    assert len(read_toml(tmp_path / "r.toml")["data"]) == 99


def test_rope_scaling_of_the_default_kind_is_read(folder: Path) -> None:
    edited(
        folder / "config.json",
        rope_parameters=None,
        rope_theta=None,
        rope_scaling={"rope_type": "default", "rope_theta": 5e5},
    )
    assert open_any(folder).config.rope_theta == 5e5
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert theirs.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("stored", ["both", "head alone", "embedding alone"])
def test_a_stored_head_that_differs_is_kept(stored: str, folder: Path) -> None:
    """Tied says the config; transformers 5 ties where one is missing and keeps two that differ."""
    edited(folder / "config.json", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    lost = {"both": None, "head alone": embedding, "embedding alone": head}[stored]
    tensors.pop(lost, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(3, 30)[None]
    ours = load_model(folder)
    with torch.no_grad():
        difference = ours.logits(ours(tokens)) - theirs(tokens).logits
    assert difference.abs().max() < 1e-5
    assert ours.lm_head.weight.data_ptr() != ours.model.embed_tokens.weight.data_ptr()
