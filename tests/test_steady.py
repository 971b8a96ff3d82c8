"""Files that change while a model is read. Run: pytest tests/test_steady.py -q"""

import json
import os
import shutil

import pytest
import torch

import puna
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model, open_source, save_model
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.data import encoding

FORMATS = ["folder", "model.bin", "model.gguf"]


@pytest.fixture(params=FORMATS)
def stored(tiny, tmp_path, request):
    """A model in one of the formats that are read tensor by tensor, and the file of its weights."""
    path = tmp_path / request.param
    if request.param == "folder":
        shutil.copytree(tiny / "chat", path)
        return path, path / "model.safetensors"
    if request.param == "model.gguf":
        pytest.importorskip("gguf")
    convert(tiny / "chat", path)
    return path, path


def flipped(file):
    """Another file of the same size in its place, as a run's end puts one there."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.with_name("other").write_bytes(data)
    file.with_name("other").rename(file)


@pytest.mark.parametrize("way", ["tensors", "pieces"])
def test_half_of_one_model_and_half_of_another_is_none(stored, way):
    path, file = stored
    source = open_source(path)
    read = iter(getattr(source, way)())
    next(read)
    flipped(file)
    with pytest.raises(ValueError, match=f"^{file} was changed while it was read; run"):
        list(read)
    assert list(getattr(open_source(path), way)())


def test_what_is_gone_has_changed_and_what_was_read_before_is_whole(stored):
    path, file = stored
    source, model = open_source(path), load_model(path)
    before = {name: tensor.clone() for name, tensor in source.tensors()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name].float())
    os.remove(file)
    with pytest.raises((ValueError, OSError)):
        list(source.tensors())


def test_a_model_that_is_saved_again_meanwhile_is_refused_by_name(tiny, tmp_path):
    """In place of the folder, as every run's end does it."""
    save_model(tmp_path / "model", load_model(tiny / "chat"), tiny / "tokenizer.model")
    source = open_source(tmp_path / "model")
    read = source.tensors()
    next(read)
    save_model(tmp_path / "model", load_model(tiny / "lm"), tiny / "tokenizer.model")
    with pytest.raises(ValueError, match="was changed while it was read"):
        list(read)
    assert puna.load(tmp_path / "model", device="cpu").generate("red", max_new_tokens=2) is not None


def test_the_base_of_an_adapter_is_held_to_the_same(tiny, tmp_path):
    """And what only its time shows: written anew, byte for byte, which nobody can tell apart from
    another model without reading it again."""
    shutil.copytree(tiny / "chat", tmp_path / "model")
    source = open_source(tmp_path / "model")
    os.utime(tmp_path / "model" / "config.json", ns=(1, 1))
    with pytest.raises(ValueError, match=r"config.json was changed while"):
        list(source.tensors())


def test_a_text_that_changes_while_it_is_encoded_is_no_corpus(tiny, tmp_path, monkeypatch):
    """Its hash was taken before; the shard that was written is not named in the index."""
    text, write = tmp_path / "text.jsonl", encoding.write_shard
    shutil.copy(tiny / "text.jsonl", text)
    tokenizer = Tokenizer(tiny / "tokenizer.model")

    def changed(*args, **options):
        found = write(*args, **options)
        if args[0].name.endswith("1.npy"):
            flipped(text)
        return found

    monkeypatch.setattr(encoding, "write_shard", changed)
    with pytest.raises(ValueError, match=f"^{text} was changed while it was read"):
        encoding.encode_folder(tmp_path / "corpus", tokenizer, encoding.Texts([text]), shard=500)
    index = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert not index["complete"] and [*index["shards"]] == ["tokens-00000.npy"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was written of other texts"):
        encoding.encode_folder(tmp_path / "corpus", tokenizer, encoding.Texts([text]), shard=500)
