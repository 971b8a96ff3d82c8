"""One greedy continuation, known from llama2.c's own tests, by every road through the engine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.ops import use_backend
from puna.core.text.tokenizer import Tokenizer

SHARED = Path(
    os.environ.get("PUNA_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
)
STORIES = SHARED / "stories260K"
NEW_TOKENS = 200

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not STORIES.exists(), reason=f"no real inputs at {SHARED}"),
]


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request) -> Iterator[None]:
    """With native code, where it was built, and without."""
    with use_backend(request.param):
        yield


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model(STORIES / "stories260K.bin")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(STORIES / "tok512.model")


@pytest.fixture(scope="module")
def expected() -> str:
    return (STORIES / "expected_temp0_n200.txt").read_text(encoding="utf-8")


def greedy(model: Transformer, prompts: list[list[int]]) -> list[list[int]]:
    completions = generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_id=None, temperature=0.0)
    return [completion.tokens for completion in completions]


def test_single(model: Transformer, tokenizer: Tokenizer, expected: str) -> None:
    assert tokenizer.decode(greedy(model, [[tokenizer.bos_id]])[0]) == expected


def test_batched_with_longer_prompts(
    model: Transformer, tokenizer: Tokenizer, expected: str
) -> None:
    """Right-padded rows beside ours, and a row that starts with part of the expected text."""
    bos = [tokenizer.bos_id]
    begun = bos + greedy(model, [bos])[0][:37]
    other = tokenizer.encode("The dog was very", bos=True)
    rows = greedy(model, [other, bos, begun])
    assert tokenizer.decode(rows[1]) == expected
    assert tokenizer.decode((begun[1:] + rows[2])[:NEW_TOKENS]) == expected


def test_batch_of_32(model: Transformer, tokenizer: Tokenizer, expected: str) -> None:
    """Beginnings of the text of all lengths: each goes on to its end."""
    whole = [tokenizer.bos_id, *greedy(model, [[tokenizer.bos_id]])[0]]
    rows = [whole[: 1 + 6 * i] for i in range(32)]
    for row, found in zip(rows, greedy(model, rows), strict=True):
        assert [*row, *found][: len(whole)] == whole
    assert tokenizer.decode(whole[1:]) == expected


@torch.inference_mode()
def test_without_cache(model: Transformer, tokenizer: Tokenizer, expected: str) -> None:
    tokens = [tokenizer.bos_id]
    for _ in range(NEW_TOKENS):
        hidden = model(torch.tensor([tokens]))
        tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    assert tokenizer.decode(tokens[1:]) == expected


def test_through_a_model_folder(tokenizer: Tokenizer, expected: str, tmp_path: Path) -> None:
    folder = convert(
        STORIES / "stories260K.bin", tmp_path / "model", tokenizer=STORIES / "tok512.model"
    )
    tokens = greedy(load_model(folder), [[tokenizer.bos_id]])[0]
    assert tokenizer.decode(tokens) == expected
