"""Strings that end a text, on every path that generates. Run: pytest tests/test_stopping.py -q"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import puna
from puna.core import ops
from puna.core.generation import continuous, generate, slots
from puna.core.generation.stopping import streamed

CHATS = [[{"role": "user", "content": text}] for text in ("red cup", "moon", "why how", "nine")]
TEXTS = ["red blue", "", "the moon ", "why\n"]
HOT = {"temperature": 1.5, "max_new_tokens": 60}


def cut(text: str, strings: list[str]) -> str:
    """Character by character: the text until one of the strings is there, without it."""
    for end in range(len(text) + 1):
        ending = [each for each in strings if text[:end].endswith(each)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def pieces(text: str, draw: random.Random, longest: int) -> str:
    """A piece of a text, most often across tokens; of whole characters only."""
    while True:
        at = draw.randrange(3, len(text) - 3)
        piece = text[at : at + draw.randint(1, longest)]
        if "\ufffd" not in piece:
            return piece


@pytest.fixture(scope="module")
def llama(tiny):
    return puna.load(tiny / "lm", device="cpu")  # a random model never says EOS: long texts


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
@pytest.mark.parametrize("prompts", [CHATS, TEXTS], ids=["chats", "texts"])
def test_a_text_ends_before_the_string_that_is_complete_first(llama, backend, top_p, prompts):
    draw = random.Random(0)
    options = {**HOT, "top_p": top_p, "batch_size": 3}
    with ops.use_backend(backend):
        whole = llama.generate(prompts, **options)
        for longest in (1, 2, 5, 9):
            strings = [pieces(text, draw, longest) for text in whole]
            expected = [cut(text, strings) for text in whole]
            assert expected != whole
            if prompts is CHATS:
                expected = [text.strip() for text in expected]
            assert llama.generate(prompts, **options, stop=strings) == expected
            first = "".join(llama.stream(prompts[0], **HOT, top_p=top_p, stop=strings))
            assert (first.strip() if prompts is CHATS else first) == expected[0]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nothing_is_drawn_for_long_behind_it(llama, backend, monkeypatch):
    """Ids up to the one that completes the string; some more were drawn, not all."""
    drawn = []
    decode, continued = continuous.decode, slots.continued

    def watched(*args, **kwargs):
        for each in decode(*args, **kwargs):
            drawn.extend(each.tokens.tolist())
            yield each

    def watched_slots(*args, **kwargs):
        for each in continued(*args, **kwargs):
            drawn.extend(each.tokens)
            yield each

    monkeypatch.setattr(generate.continuous, "decode", watched)
    monkeypatch.setattr(generate, "continued", watched_slots)
    tokenizer = llama.tokenizer
    (text,) = llama.generate([TEXTS[0]], **HOT)
    strings = (pieces(text, random.Random(2), 5),)
    drawn.clear()
    options = {"eos_id": None, "max_new_tokens": 200, "temperature": 1.5, "top_p": 0.9}
    known = tokenizer.encode(TEXTS[0])
    stops = generate.Stops(strings, tokenizer, [known])
    with ops.use_backend(backend):
        (done,) = generate.generate(
            llama.model, [[tokenizer.bos_id, *known]], **options, stops=stops
        )
    assert done.finished and len(done.logprobs) == len(done.tokens)
    assert stops.text(0, done.tokens) == cut(text, list(strings))
    assert strings[0] in tokenizer.decode(known + done.tokens)
    assert strings[0] not in tokenizer.decode(known + done.tokens[:-1])
    assert len(done.tokens) <= len(drawn) <= len(done.tokens) + 16


def test_a_string_in_the_prompt_ends_nothing(llama):
    whole = llama.generate("red\nblue\n", **HOT)
    assert llama.generate("red\nblue\n", **HOT, stop="d\nb") == whole
    assert llama.generate("red\nblue\n", **HOT, stop="\n" + whole[:3]) == whole


def test_a_memory_goes_on_behind_it(tiny):
    """What is behind the string was run and is not in the next prompt."""
    chat = puna.load(tiny / "chat", device="cpu")
    memory, messages = puna.Memory(), list(CHATS[0])
    for _ in range(3):
        options = {**HOT, "stop": ["e", "o"], "round_index": len(messages)}
        answer = chat.generate(messages, **options, memory=memory)
        assert answer == chat.generate(messages, **options)
        messages += [{"role": "assistant", "content": answer or "red"}, *CHATS[1]]


def test_a_tokenizer_of_bytes(tmp_path):
    from byte_level import byte_level, with_model

    other = puna.load(with_model(byte_level(tmp_path / "m"), 280), device="cpu")
    whole = other.generate(TEXTS, **HOT)
    strings = [pieces(text, random.Random(1), 4) for text in whole if len(text) > 9]
    assert other.generate(TEXTS, **HOT, stop=strings) == [cut(text, strings) for text in whole]


@given(st.lists(st.text("abc", max_size=4)), st.lists(st.text("abc", min_size=1), min_size=1))
def test_pieces_joined_are_the_text_cut(pieces, strings):
    found = list(streamed(pieces, strings))
    assert "".join(found) == cut("".join(pieces), strings) and all(found)


@pytest.mark.parametrize("stop", ["", [""], ["a", 3], 3, None])
def test_what_is_no_string_is_refused(llama, stop):
    for call in (llama.generate, llama.stream):
        with pytest.raises(ValueError, match="must be a text that is not empty"):
            call("red", stop=stop)
