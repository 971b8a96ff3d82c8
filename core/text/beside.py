"""What stands beside a tokenizer in a model's folder: special tokens, EOS ids, chat template."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from puna.core.documents import field, read_object, regular_file, typed

LARGEST_TEMPLATE = 1 << 20  # bytes; the longest known ones have 20 KB
# The template that Puna writes: core/text/chat.py as text, BOS before and EOS after each exchange,
# the system message inside the first user message. `trim` is Python's strip.
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
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Beside(NamedTuple):
    """What a folder says of its tokenizer."""

    tokens: dict[str, str]
    """bos_token, eos_token and so on, as far as they are named"""
    ids: dict[str, tuple[int, ...]]
    """bos_token_id and eos_token_id of config.json and generation_config.json"""
    template: str | None = None
    vocab_size: int | None = None
    """of the model"""


def read_beside(tokenizer: Path) -> Beside:
    """What the folder of a tokenizer's file says; nothing where the files are not there.

    Raises ValueError, which names the file, for one that is damaged.
    """
    folder = tokenizer.parent
    tokens: dict[str, str] = {}
    ids: dict[str, tuple[int, ...]] = {}
    template: str | None = None
    vocab_size: int | None = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for document in _documents(folder / name):
            with _naming(folder / name):
                tokens |= _tokens(document)
                template = _template(document) or template
    for name in ("config.json", "generation_config.json"):
        for document in _documents(folder / name):
            with _naming(folder / name):
                for key in ("bos_token_id", "eos_token_id"):
                    ids[key] = tuple(dict.fromkeys((*_ids(document, key), *ids.get(key, ()))))
                if name == "config.json":
                    vocab_size = field(document, "vocab_size", int, None)
    file = folder / "chat_template.jinja"
    if file.exists():
        if regular_file(file).stat().st_size > LARGEST_TEMPLATE:
            raise ValueError(f"{file} is too long for a chat template; fetch it again")
        try:
            template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8, expected UTF-8 text") from error
    return Beside(tokens, ids, template, vocab_size)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _documents(path: Path) -> list[dict[str, Any]]:
    return [read_object(path)] if path.exists() else []


def _tokens(document: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in NAMES:
        value = document.get(name)
        if isinstance(value, dict):  # an added token with its flags
            value = value.get("content")
        if value is not None:
            found[name] = typed(value, str, name)
    return found


def _template(document: dict[str, Any]) -> str | None:
    """The chat template, of several the one named default."""
    value = document.get("chat_template")
    if isinstance(value, list):
        named = [typed(each, dict, "chat_template[]") for each in value]
        chosen = [each.get("template") for each in named if each.get("name") == "default"]
        value = chosen[0] if chosen else None
    if value is None:
        return None
    text = typed(value, str, "chat_template")
    if len(text) > LARGEST_TEMPLATE:
        raise ValueError("the chat template is too long")
    return text


def _ids(document: dict[str, Any], key: str) -> list[int]:
    """One id or several; those of other tokenizers (negative ones: none) are left out."""
    value = document.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [each for each in (typed(each, int, key) for each in values) if 0 <= each < 1 << 31]
