"""A SentencePiece byte-pair model as Hugging Face's tokenizer.json and tokenizer_config.json.

transformers 5 reads tokenizer.model only with protobuf installed, and then joins runs of spaces
otherwise than SentencePiece. From a tokenizer.json every version gives SentencePiece's ids.
"""

import hashlib
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

from puna.core.checkpoint.shards import write_json
from puna.core.checkpoint.tokenizer_check import difference
from puna.core.config import ModelConfig
from puna.core.documents import read_object
from puna.core.text.beside import CHAT_TEMPLATE
from puna.core.text.opened import document_of
from puna.core.text.tokenizer import Tokenizer
from puna.core.text.vocabulary import added_json, sentencepiece_json

# Llama 2 has no padding piece. Its unknown piece never ends a sequence (bytes spell what is
# unknown), so a scorer that looks for the last token which is not padding finds the last one.
PAD_ID = 0
# Beside a tokenizer.json.
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def pad_id(tokenizer: Tokenizer) -> int:
    """The first id that ends no sequence, 0 in most vocabularies."""
    return next(token for token in range(tokenizer.vocab_size) if token not in tokenizer.eos_ids)


def adds_tokens(document: Path, pieces: int) -> bool:
    """Whether a tokenizer.json has tokens behind the `pieces` of the tokenizer.model beside it."""
    added = read_object(document).get("added_tokens")
    entries = [each for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    return any(type(each.get("id")) is int and each["id"] >= pieces for each in entries)


# tokenizer.json as it stands. What it gives a model is said, because the class's own list has
# token_type_ids, which a Llama refuses: `model(**tokenizer(text))`, as in RewardBench, failed.
FAST = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
}


def copy_json(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """The files of a tokenizer.json as they are, into `folder`; what transformers needs besides is
    written where it is not there."""
    source = tokenizer.path
    write_json(folder / "tokenizer.json", document_of(source))
    beside = (*map(source.with_name, OTHERS), *source.parent.glob("chat_template*"))
    for file in () if source.suffix == ".gguf" else beside:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    document = {"model_max_length": config.context, **tokenizer.names}
    document |= FAST
    if (folder / OTHERS[0]).exists():
        document = read_object(folder / OTHERS[0])
    if source.suffix == ".gguf" or tokenizer.chat_template == CHAT_TEMPLATE:
        document["chat_template"] = tokenizer.chat_template  # what a dialogue is written with here
    write_json(folder / OTHERS[0], document)


def tokenizer_config_json(config: ModelConfig, head: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of tokenizer_config.json, with the chat template."""
    pieces = _special_pieces(tokenizer)
    return {
        **FAST,
        "unk_token": pieces[PAD_ID],
        "bos_token": pieces[tokenizer.bos_id],
        "eos_token": pieces[tokenizer.eos_id],
        "pad_token": pieces[PAD_ID] if head == "score" else None,
        "added_tokens_decoder": {str(token): added_json(piece) for token, piece in pieces.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context,
        "chat_template": tokenizer.chat_template or CHAT_TEMPLATE,
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
    ids = range(tokenizer.pieces)
    special = _special_pieces(tokenizer)
    return sentencepiece_json(
        [tokenizer.piece(token) for token in ids],
        [tokenizer.piece_score(token) for token in ids],
        [tokenizer.is_text(token) for token in ids],
        {token: (piece, True) for token, piece in special.items()},
        special[tokenizer.bos_id],
    )


def _special_pieces(tokenizer: Tokenizer) -> dict[int, str]:
    """Unknown, BOS and EOS: id -> piece."""
    return {i: tokenizer.piece(i) for i in (PAD_ID, tokenizer.bos_id, tokenizer.eos_id)}
