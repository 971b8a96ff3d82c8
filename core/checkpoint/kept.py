"""What a folder holds besides the model stays: when a model is saved over another one, and when it
is converted. Chat templates and generation settings of a source are kept, too."""

import json
import os
import re
import shutil
from pathlib import Path

from puna.core.documents import field, read_object

# Files that belong to the weights or to the tokenizer: a model that is saved brings its own.
MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|training|model.*\.safetensors(\.index\.json)?"
    r"|tokenizer\.model|tokenizer\.json|tokenizer_config\.json|chat_template.*"
    r"|special_tokens_map\.json|added_tokens\.json"
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def keep_foreign(old: Path, new: Path) -> None:
    """Everything in the folder `old` that no model brings, in `new`, which takes its place."""
    for entry in sorted(old.iterdir()) if old.is_dir() else ():
        if MODEL_FILES.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(old: str | Path, new: str | Path) -> None:
    """A second name for a file that is about to lose its first: it needs no room."""
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def carry_over(source: Path, target: Path, *, same_tokenizer: bool) -> None:
    """Copy what the model folder `source` says beyond its weights into `target`, a folder made from
    it: other files, generation settings, the chat template and, where the tokenizer is the same,
    the tokenizer's files as they are. Raises ValueError for one of these that is damaged."""
    for file in sorted(source.iterdir()):
        foreign = not MODEL_FILES.fullmatch(file.name) and file.suffix not in WEIGHTS
        if file.is_file() and foreign and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    names = [file.name for file in source.glob("chat_template*")]
    if (target / "generation_config.json").exists():  # a language model
        names.append("generation_config.json")
    if same_tokenizer and (source / "tokenizer.json").is_file():
        names += TOKENIZER_FILES
    elif (source / "tokenizer_config.json").is_file():
        _keep_template(source / "tokenizer_config.json", target / "tokenizer_config.json")
    for name in names:
        if (source / name).is_file():
            if name.endswith(".json"):
                read_object(source / name)  # a damaged one is not handed on
            shutil.copyfile(source / name, target / name)


def _keep_template(source: Path, target: Path) -> None:
    stored = read_object(source)
    kind = list if isinstance(stored.get("chat_template"), list) else str  # several have names
    try:
        template = field(stored, "chat_template", kind, None)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if template is None or not target.exists():
        return
    document = read_object(target) | {"chat_template": template}
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
