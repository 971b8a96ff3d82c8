"""The tokenizer in a model folder, opened by transformers: the same ids, the same chats."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.checkpoint.folder import save_model
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.chat import Message, encode_dialogue, encode_prompt
from puna.core.text.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")
jinja2 = pytest.importorskip("jinja2")

SHARED = Path(
    os.environ.get("PUNA_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
)
LLAMA2 = SHARED / "llama2-tokenizer" / "tokenizer.model"
TEXTS = ["[INST] hello there [/INST] general answer", "<<SYS>> be kind <</SYS>> 7 times"] * 20

DIALOGUES = [
    [("user", "hello there")],
    [("system", " be kind\n"), ("user", "  hello  ")],
    [("user", "hello"), ("assistant", " general \n"), ("user", "7 times\n[2]")],
    [("system", "be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, path, vocab_size=320)
    return path


def save_random_model(folder: Path, tokenizer: Path) -> None:
    vocab_size = Tokenizer(tokenizer).vocab_size
    model = Transformer(ModelConfig(8, 1, 1, 1, 8, vocab_size, context=64))
    model.init_weights()
    save_model(folder, model, tokenizer)


def messages(dialogue: list[tuple[str, str]]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in dialogue]


def chat_ids(tokenizer: Tokenizer, dialogue: list[Message]) -> list[int]:
    if dialogue[-1]["role"] == "user":
        return encode_prompt(tokenizer, dialogue)
    return encode_dialogue(tokenizer, dialogue)[0]


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_chat_template_is_our_chat_format(dialogue: list, tokenizer: Path, tmp_path: Path) -> None:
    """The rendered text, cut at BOS and EOS and encoded, is what core/text/chat.py encodes."""
    save_random_model(tmp_path, tokenizer)
    document = json.loads((tmp_path / "tokenizer_config.json").read_text())
    text = (
        jinja2.Environment()
        .from_string(document["chat_template"])
        .render(messages=messages(dialogue), bos_token="<s>", eos_token="</s>")
    )
    ours = Tokenizer(tokenizer)
    ids: list[int] = []
    for part in filter(None, re.split("(</?s>)", text)):
        special = {"<s>": [ours.bos_id], "</s>": [ours.eos_id]}
        ids += special.get(part) or ours.encode(part)
    assert ids == chat_ids(ours, messages(dialogue))


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("[]/<INST >\n gerhlot72ü🙂"), max_size=30))
def test_transformers_encodes_and_decodes_as_we_do(saved_tokenizer: tuple, text: str) -> None:
    ours, theirs = saved_tokenizer
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.encode(text) == [ours.bos_id, *ids]


@pytest.fixture(scope="module")
def saved_tokenizer(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("saved")
    save_random_model(folder, tokenizer)
    return Tokenizer(tokenizer), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.shared
@pytest.mark.skipif(not LLAMA2.exists(), reason=f"no real inputs at {SHARED}")
def test_transformers_encodes_with_llama2s_tokenizer_as_we_do(tmp_path: Path) -> None:
    save_random_model(tmp_path, LLAMA2)
    ours, theirs = Tokenizer(LLAMA2), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for dialogue in DIALOGUES:
        expected = chat_ids(ours, messages(dialogue))
        assert theirs.apply_chat_template(messages(dialogue), return_dict=False) == expected
    texts = (LLAMA2.parent / "expected.inp").read_text(encoding="utf-8")
    rows = (LLAMA2.parent / "expected.out").read_text().split("\n")
    for text, row in zip(texts.split("\n__ggml_vocab_test__\n"), rows, strict=True):
        found = theirs.encode(text, add_special_tokens=False)
        assert found == [int(token) for token in row.split()]
    for text in [" " * n + "x" + "-" * n + "\n" * (n % 5) + "a" * n for n in range(60)]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_what_the_tokenizer_gives_is_what_the_model_takes(tokenizer: Path, tmp_path: Path) -> None:
    """`model(**tokenizer(text))`: token_type_ids, which some classes add, a Llama refuses."""
    save_random_model(tmp_path, tokenizer)
    document = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert document["model_input_names"] == ["input_ids", "attention_mask"]
    given = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        ["hello there"], return_tensors="pt"
    )
    assert set(given) == {"input_ids", "attention_mask"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model(**given).logits.isfinite().all()
