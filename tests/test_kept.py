"""Conversion and saving keep what they are given, and say what they cannot keep."""

import io
import json
import os
import stat
import warnings
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import puna
from puna.cli.main import main as puna_command
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model, save_model, tokenizer_path
from puna.core.checkpoint.hf_tokenizer import tokenizer_json
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["[INST] hello there [/INST] general answer", "<<SYS>> be kind <</SYS>> 7 times"] * 20
LLAMA2 = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}


def sentencepiece_model(path: Path, **options) -> Path:
    """A model trained with Llama 2's settings, but for `options`."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=buffer,
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
        **LLAMA2 | options,
    )
    path.write_bytes(buffer.getvalue())
    return path


def small_model(vocab_size: int, head: str = "lm") -> Transformer:
    model = Transformer(ModelConfig(8, 1, 2, 1, 8, vocab_size, context=64), head)
    model.init_weights()
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(TEXTS, tmp_path / "tokenizer.model", vocab_size=320)
    save_model(tmp_path / "model", small_model(320), tmp_path / "tokenizer.model")
    return tmp_path / "model"


# --- types


def test_each_tensor_keeps_its_type(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    types = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    mixed = {name: t.to(types[i % 4]) for i, (name, t) in enumerate(tensors.items())}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_file(convert(folder, tmp_path / "kept") / "model.safetensors")
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in mixed.items()}
    assert all(torch.equal(found[name], mixed[name]) for name in mixed)
    embedding = str(mixed["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    document = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert document["torch_dtype"] == embedding
    found = load_file(convert(folder, tmp_path / "one", dtype=torch.bfloat16) / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("stored", "number", "target", "dtype"),
    [
        (torch.float32, 1e5, "half", torch.float16),
        (torch.bfloat16, -1e30, "half", torch.float16),
        (torch.float64, 1e300, "single", torch.float32),
        (torch.float64, 1e300, "model.bin", None),
    ],
)
def test_numbers_that_do_not_fit(stored, number, target, dtype, folder, tmp_path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    tensors["model.norm.weight"][3] = number
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight holds \S+, and float\d+ ends at"):
        convert(folder, tmp_path / target, dtype=dtype)
    assert not (tmp_path / target).exists()
    if dtype is not None:
        with pytest.raises(ValueError, match="model.norm.weight holds"):
            load_model(folder, dtype=dtype)


def test_infinite_already_is_kept(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_file(convert(folder, tmp_path / "half", dtype=torch.float16) / "model.safetensors")
    assert found["model.norm.weight"][3] == float("inf")


# --- tokenizers

MORE_TEXTS = [
    "hello  there ",
    "\ufb01ne \u2460 x",
    " 7 times 77",
    "",
    "<mask> hello",
    "\u4e2d\U0001f642 a",
]


def gives_other_ids(path: Path, file: Path) -> bool:
    """Whether Hugging Face's own library reads other ids from the tokenizer.json of ours."""
    tokenizers = pytest.importorskip("tokenizers")
    file.write_text(json.dumps(tokenizer_json(path)))
    ours, theirs = Tokenizer(path), tokenizers.Tokenizer.from_file(str(file))
    return any(
        theirs.encode(text, add_special_tokens=False).ids != ours.encode(text)
        for text in MORE_TEXTS
    )


ODD = {
    "unigram": {"model_type": "unigram"},
    "no dummy prefix": {"add_dummy_prefix": False},
    "spaces at the end": {"treat_whitespace_as_suffix": True},
    "NFKC": {"normalization_rule_name": "nmt_nfkc"},
    "no extra spaces": {"remove_extra_whitespaces": True},
    "own symbols": {"user_defined_symbols": ["hello", "<mask>"]},
    "word": {"model_type": "word"},
}


@pytest.mark.parametrize("kind", ODD)
def test_a_tokenizer_json_that_would_lie_is_left_out(kind: str, tmp_path: Path, capsys) -> None:
    path = sentencepiece_model(tmp_path / "tokenizer.model", **ODD[kind])
    with pytest.warns(UserWarning, match="would give other ids than .* it is left out"):
        save_model(tmp_path / "model", small_model(Tokenizer(path).vocab_size), path)
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    assert gives_other_ids(path, tmp_path / "lie.json")
    assert tokenizer_path(tmp_path / "model").read_bytes() == path.read_bytes()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    words = ["convert", "--source", tmp_path / "model", "--target", tmp_path / "other"]
    assert puna_command([str(word) for word in words]) == 0
    said = capsys.readouterr()
    assert "a tokenizer.json would give other ids" in said.out and not said.err


@pytest.mark.parametrize(
    "options",
    [{}, {"byte_fallback": False}, {"split_digits": False}, {"model_type": "char"}],
)
def test_a_tokenizer_json_that_tells_the_truth_is_written(options: dict, tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "tokenizer.model", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(tmp_path / "model", small_model(Tokenizer(path).vocab_size), path)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert not gives_other_ids(path, tmp_path / "lie.json")


@pytest.mark.shared
def test_llama2s_own_tokenizer_is_written(shared: Path, tmp_path: Path) -> None:
    path = shared / "llama2-tokenizer" / "tokenizer.model"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(tmp_path / "model", small_model(32000), path)
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_a_wholly_wrong_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other = ["zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich"] * 40
    train_tokenizer(other, tmp_path / "wrong.model", vocab_size=320)
    with pytest.raises(ValueError, match="agrees with the model's own .* in 1?[0-9] of 61 pieces"):
        convert(folder, tmp_path / "no", tokenizer=tmp_path / "wrong.model")
    with pytest.raises(ValueError, match="pieces; leave it out"):
        puna.load(folder, tokenizer=tmp_path / "wrong.model")
    puna.load(folder, tokenizer=folder / "tokenizer.model")


# --- files


def test_conversion_keeps_templates_settings_and_files(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": "{{ messages }}", "model_max_length": 7}
    written = {
        "tokenizer_config.json": json.dumps(config),
        "generation_config.json": '{"temperature": 0.6, "eos_token_id": [2, 3]}',
        "chat_template.jinja": "{{ theirs }}",
        "README.md": "read me",
        "LICENSE": "yours",
    }
    for name, text in written.items():
        (folder / name).write_text(text)
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "original").mkdir()
    target = convert(folder, tmp_path / "target", dtype=torch.bfloat16)
    for name, text in written.items():
        assert (target / name).read_text() == text
    assert not (target / "pytorch_model.bin").exists() and not (target / "original").exists()
    other = convert(folder, tmp_path / "other", tokenizer=folder / "tokenizer.model")
    document = json.loads((other / "tokenizer_config.json").read_text())
    assert (document["chat_template"], document["model_max_length"]) == ("{{ messages }}", 64)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("generation_config.json", "[]", "generation_config.json must hold a JSON object"),
        ("generation_config.json", "{", "generation_config.json: not JSON"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is 3, expected a text"),
        ("tokenizer.json", "", "tokenizer.json: not JSON"),
    ],
)
def test_what_is_damaged_is_not_handed_on(name, text, message, folder, tmp_path) -> None:
    (folder / name).write_text(text)
    if name == "tokenizer_config.json":
        (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_saving_over_a_folder_keeps_what_is_no_models(folder: Path) -> None:
    (folder / "README.md").write_text("read me")
    (folder / "plots" / "deep").mkdir(parents=True)
    (folder / "plots" / "deep" / "loss.csv").write_text("1")
    (folder / "note").symlink_to("README.md")
    (folder / "training").mkdir()  # of other weights
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    save_model(folder, small_model(320, "score"), folder / "tokenizer.model")
    assert (folder / "README.md").read_text() == "read me"
    assert (folder / "plots" / "deep" / "loss.csv").read_text() == "1"
    assert os.readlink(folder / "note") == "README.md"
    assert load_model(folder).head == "score"
    assert not (folder / "generation_config.json").exists() and not (folder / "training").exists()
    assert len(list(folder.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_weights_have_the_mode_of_their_neighbours(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_model(tmp_path / "one", small_model(320))
        save_model(tmp_path / "many", small_model(320), shard_bytes=1000)
    finally:
        os.umask(before)
    files = [*(tmp_path / "one").iterdir(), *(tmp_path / "many").iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


# --- what is no model


def gguf(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\0" * 99)
    return folder


def gguf_file(folder: Path) -> Path:
    return gguf(folder) / "model.gguf"


def adapter(folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x": torch.ones(2)}, folder / "adapter_model.safetensors")
    return folder


def no_index(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    return folder


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def pickled_file(folder: Path) -> Path:
    return pickled(folder) / "pytorch_model.bin"


def prefixed(prefix: str):
    def harm(folder: Path) -> Path:
        tensors = load_file(folder / "model.safetensors")
        save_file({prefix + n: t for n, t in tensors.items()}, folder / "model.safetensors")
        return folder

    return harm


def finished_run(folder: Path) -> Path:
    out = folder.with_name("run")
    out.mkdir()
    (out / "config.toml").write_text("lr = 1\n")
    folder.rename(out / "model")
    return out


def stopped_run(folder: Path) -> Path:
    out = folder.with_name("run")
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.toml").write_text("lr = 1\n")
    folder.rename(out / "checkpoints" / "step-000010")
    return out


def weights_file(folder: Path) -> Path:
    return folder / "model.safetensors"


MISTAKEN = {
    gguf: "holds GGUF files; give one of them, such as .*model.gguf",
    gguf_file: "model.gguf is damaged or no GGUF file .its version is 0, expected 2 or 3.; fetch",
    adapter: "adapter_config.json: lora_alpha is missing, expected a finite number",
    no_index: "model-00001-of-00002.safetensors and no model.safetensors.index.json",
    pickled: "holds no model.safetensors; Puna reads no pickled weights",
    pickled_file: "pytorch_model.bin is a pickled PyTorch file; give",
    prefixed("_orig_mod."): "names begin with `_orig_mod.`, which torch.compile puts there; save",
    prefixed("module."): "names begin with `module.`, which a distributed wrapper puts there",
    prefixed("base_model.model."): "names begin with `base_model.`, which peft puts there; merge",
    finished_run: "run is a run's folder; its model is .*run/model",
    stopped_run: "a run that is not finished; its newest checkpoint is .*run/checkpoints/step-0000",
    weights_file: "model.safetensors is a file of weights; give its folder, .*model",
}


@pytest.mark.parametrize("harm", MISTAKEN)
def test_what_is_no_model_is_called_what_it_is(harm, folder: Path) -> None:
    path = harm(folder)
    with pytest.raises(ValueError, match=MISTAKEN[harm]):
        load_model(path)
    if harm in (finished_run, stopped_run):
        with pytest.raises(ValueError, match=MISTAKEN[harm]):
            tokenizer_path(path)
