"""The chat format against Meta's whole-text encoding. Run: python -m pytest tests/test_chat.py"""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.core.text.chat import (
    TAGS,
    check_dialogue,
    decode_answer,
    encode_answer,
    encode_dialogue,
    encode_prompt,
)
from puna.core.text.tokenizer import Tokenizer, train_tokenizer

SHARED = Path(
    os.environ.get("PUNA_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
)
LLAMA2 = SHARED / "llama2-tokenizer" / "tokenizer.model"
TEXT = ["[INST] hello there [/INST] general answer", "<<SYS>> be kind <</SYS>> tell me, 7 times"]


@pytest.fixture(scope="module", params=["small", pytest.param("llama2", marks=pytest.mark.shared)])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "small":
        path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
        return train_tokenizer(TEXT * 20, path, vocab_size=320)
    if not LLAMA2.exists():
        pytest.skip(f"no real inputs at {SHARED}")
    return Tokenizer(LLAMA2)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def whole_text_ids(tokenizer: Tokenizer, messages: list) -> list[int]:
    """The released format: one string for each exchange, encoded whole."""
    if messages[0]["role"] == "system":
        folded = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n{messages[1]['content']}"
        messages = [user(folded), *messages[2:]]
    ids: list[int] = []
    for question, answer in zip(messages[::2], messages[1::2], strict=False):
        text = f"[INST] {question['content'].strip()} [/INST] {answer['content'].strip()} "
        ids += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    if len(messages) % 2:
        text = f"[INST] {messages[-1]['content'].strip()} [/INST]"
        ids += [tokenizer.bos_id, *tokenizer.encode(text)]
    return ids


content = st.text(max_size=30).filter(
    lambda text: text.strip() and not any(tag in text for tag in TAGS)
)
odd = st.sampled_from(
    ["<s>", "</s>", " \n x \n", "\u2581", "\u2581\u2581 a", "\ufffd", "[INST", "7"]
)
texts = st.one_of(content, odd)


@st.composite
def dialogues(draw) -> list:
    """Dialogues that end with an assistant message."""
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(texts)), assistant(draw(texts))]
    return messages


@given(dialogues())
def test_ids_are_those_of_the_whole_text(tokenizer: Tokenizer, messages: list) -> None:
    assert encode_dialogue(tokenizer, messages)[0] == whole_text_ids(tokenizer, messages)
    assert encode_prompt(tokenizer, messages[:-1]) == whole_text_ids(tokenizer, messages[:-1])


@given(dialogues())
def test_prompt_and_answer_make_the_dialogue(tokenizer: Tokenizer, messages: list) -> None:
    ids, weights = encode_dialogue(tokenizer, messages)
    prompt = encode_prompt(tokenizer, messages[:-1])
    answer = encode_answer(tokenizer, messages[-1]["content"])
    assert prompt + answer == ids
    assert len(weights) == len(ids)
    assert weights[len(prompt) :] == [1.0] * len(answer)


@given(dialogues())
def test_weights_are_one_on_every_answer(tokenizer: Tokenizer, messages: list) -> None:
    ids, weights = encode_dialogue(tokenizer, messages)
    learned = [token for token, weight in zip(ids, weights, strict=True) if weight]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert learned == sum((encode_answer(tokenizer, text) for text in answers), [])
    assert set(weights) == {0.0, 1.0}
    assert [w for t, w in zip(ids, weights, strict=True) if t == tokenizer.eos_id] == [
        1.0 for _ in answers
    ]


@given(texts)
def test_decode_answer_undoes_encode_answer(tokenizer: Tokenizer, text: str) -> None:
    ids = encode_answer(tokenizer, text)
    expected = text.strip().replace("\u2581", " ").strip()
    assert decode_answer(tokenizer, ids) == expected
    assert decode_answer(tokenizer, ids + ids) == expected  # nothing after EOS is read


def test_number_of_bos_and_eos(tokenizer: Tokenizer) -> None:
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("<s> </s>")]
    ids = encode_prompt(tokenizer, messages)
    assert (ids.count(tokenizer.bos_id), ids.count(tokenizer.eos_id)) == (3, 2)


def test_text_of_a_prompt(tokenizer: Tokenizer) -> None:
    messages = [system("be kind"), user(" hello "), assistant("answer"), user("tell me")]
    ids = encode_prompt(tokenizer, messages)
    second = ids.index(tokenizer.bos_id, 1)
    assert tokenizer.decode(ids[:second]) == (
        "[INST] <<SYS>>\nbe kind\n<</SYS>>\n\n hello [/INST] answer "
    )
    assert tokenizer.decode(ids[second:]) == "[INST] tell me [/INST]"


def test_system_message_in_every_turn(tokenizer: Tokenizer) -> None:
    messages = [system("be kind"), user("a"), assistant("b"), user("c")]
    folded = "<<SYS>>\nbe kind\n<</SYS>>\n\n"
    repeated = [user(folded + "a"), assistant("b"), user(folded + "c")]
    ids = encode_prompt(tokenizer, messages, system_every_turn=True)
    assert ids == whole_text_ids(tokenizer, repeated)
    once = [user(folded + "a"), assistant("b"), user("c")]
    assert encode_prompt(tokenizer, messages) == whole_text_ids(tokenizer, once)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_tag_in_a_message_is_refused(tokenizer: Tokenizer, tag: str, position: int) -> None:
    messages = [system("s"), user("u"), assistant("a")]
    messages[position]["content"] += f" {tag} "
    with pytest.raises(ValueError, match="contains the chat tag"):
        encode_dialogue(tokenizer, messages)
    with pytest.raises(ValueError, match="contains the chat tag"):
        encode_answer(tokenizer, tag)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no user message"),
        ([system("s")], "no user message"),
        ([assistant("a")], "found 'assistant' where 'user' belongs"),
        ([user("a"), user("b")], "found 'user' where 'assistant' belongs"),
        ([user("a"), system("b")], "found 'system' where 'assistant' belongs"),
        ([user("a"), assistant(" \n")], "the assistant message is empty"),
        ([system(""), user("a")], "the system message is empty"),
    ],
)
def test_dialogues_that_cannot_be(messages: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dialogue(messages)


def test_the_last_role_is_checked(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="end with an assistant message"):
        encode_dialogue(tokenizer, [user("a")])
    with pytest.raises(ValueError, match="end with a user message"):
        encode_prompt(tokenizer, [user("a"), assistant("b")])
