"""A SentencePiece byte-pair model as Hugging Face's tokenizer.json and tokenizer_config.json.

transformers 5 reads tokenizer.model only with protobuf installed, and then joins runs of spaces
otherwise than SentencePiece. From a tokenizer.json every version gives SentencePiece's ids.
"""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from puna.core.checkpoint.tokenizer_check import difference
from puna.core.config import ModelConfig
from puna.core.tokenizer import Tokenizer

# Llama 2 has no padding piece. Its unknown piece never ends a sequence (bytes spell what is
# unknown), so a scorer that looks for the last token which is not padding finds the last one.
PAD_ID = 0

# core/chat.py as text: BOS before and EOS after each exchange, the system message inside the
# first user message. `trim` is Python's strip.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' + (ns.system + message['content']) | trim + ' [/INST]' -}}"
    "{%- set ns.system = '' -%}"
    "{%- else -%}"
    "{{- ' ' + message['content'] | trim + ' ' + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def tokenizer_config_json(config: ModelConfig, head: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer_config.json, with the chat template."""
    pieces = _special_pieces(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it stands
        "unk_token": pieces[PAD_ID],
        "bos_token": pieces[tokenizer.bos_id],
        "eos_token": pieces[tokenizer.eos_id],
        "pad_token": pieces[PAD_ID] if head == "score" else None,
        "added_tokens_decoder": {str(token): _added(content) for token, content in pieces.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context,
        "chat_template": CHAT_TEMPLATE,
    }


def checked_tokenizer_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`tokenizer_json`; ValueError where it would give other ids than the SentencePiece model."""
    return _checked(os.fspath(path), hashlib.sha256(Path(path).read_bytes()).digest())


@lru_cache(maxsize=2)  # every checkpoint of a run has the same
def _checked(path: str, digest: bytes) -> dict[str, Any]:
    document, tokenizer = tokenizer_json(path), Tokenizer(path)
    text = difference(document, tokenizer)
    if text is not None:
        raise ValueError(
            f"a tokenizer.json would give other ids than {path} (for {text!r}, for example), which "
            "is no byte-pair model with Llama 2's settings"
        )
    return document


def tokenizer_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of tokenizer.json for the byte-pair model at `path`.

    Every piece of text gets SentencePiece's dummy space at its head, also after BOS, as Meta's
    code encodes each exchange of a chat.
    """
    tokenizer = Tokenizer(path)
    pieces = _special_pieces(tokenizer)
    bos = pieces[tokenizer.bos_id]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, **_added(piece)} for token, piece in pieces.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                first,
                {"Sequence": {"id": "A", "type_id": 0}},
                second,
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[PAD_ID],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)},
            "merges": _merges(path),
        },
    }


def _special_pieces(tokenizer: Tokenizer) -> dict[int, str]:
    """Unknown, BOS and EOS: id -> piece."""
    return {i: tokenizer.piece(i) for i in (PAD_ID, tokenizer.bos_id, tokenizer.eos_id)}


def _added(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **flags, "special": True}


def _merges(path: str | os.PathLike[str]) -> list[str]:
    """Pairs of pieces to join, most urgent first.

    SentencePiece joins the two neighbours whose union has the highest score (the leftmost among
    equals, as the spaces are); so every way to cut a piece in two pieces is a merge of its rank.
    """
    tokenizer = Tokenizer(path)
    ids = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size) if tokenizer.is_text(i)}
    merges = []
    for piece, token in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                order = (-tokenizer.piece_score(token), ids[left], ids[right])
                merges.append((order, f"{left} {right}"))
    return [merge for _, merge in sorted(merges)]
