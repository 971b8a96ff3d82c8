"""Every kind of file that Puna reads: a whole one, how it is read and damaged, and why what is
damaged may be taken all the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from campaign import mutations

from puna.core.checkpoint.any_format import open_any
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import save_model
from puna.core.checkpoint.source import Source, interleaved, meta_name, rope_heads
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.chat import check_dialogue, encode_dialogue, encode_prompt
from puna.core.text.tokenizer import Tokenizer, train_tokenizer
from puna.demo.kept import kept, seconds
from puna.trainers import sft
from puna.trainers.data.corpus import INDEX, open_corpus
from puna.trainers.data.encoding import Texts, encode_file, encode_folder
from puna.trainers.data.ghost import GhostDialogue, read_ghost_dialogues
from puna.trainers.data.readers import read_dialogues, read_preferences, read_prompts, read_texts
from puna.trainers.rl import exchanges
from puna.trainers.rl.best_of import read_samples
from puna.trainers.rl.comparisons import read_pairs
from puna.trainers.train.config import from_values, load_recipe

TEXTS = ["[INST] <<SYS>> hello there <</SYS>> [/INST] general answer of 7 times"] * 20
SHAPE = ModelConfig(16, 2, 2, 1, 20, 290, context=32)
HUMAN = "\n\nHuman: a\n\nAssistant:"
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "there"}


class Target(NamedTuple):
    """A file that is damaged; the rest of its folder is whole."""

    name: str
    file: Path
    data: bytes
    read: Callable[[], Any]
    expected: Any
    mutate: Callable[[bytes, Random], bytes]
    taken: Callable[[Any], str]
    """why something else than what is expected may be read; "" where it may not"""


# --- why a damaged file may be taken


def other_numbers(found: tuple[ModelConfig, str, dict]) -> str:
    """Of a config: only what no size tells, and the number of heads that share a width."""
    config, head, shapes = found
    assert shapes and head in ("lm", "score")
    if (config.dim, config.ffn_dim, config.n_layers) != (16, 20, 2):
        return ""
    return "another context, epsilon, base of RoPE or division into heads, which no size tells"


def other_weights(found: tuple[ModelConfig, str, dict]) -> str:
    """Of weights: their numbers, which nothing checks in a format without a checksum."""
    _, _, shapes = found
    return "other numbers or another float type in a tensor" if len(shapes) == 21 else ""


def other_pieces(found: list[str]) -> str:
    return "other texts or scores of pieces, which SentencePiece's format does not check"


def other_ids(ids: list[int]) -> str:
    return "other ids of the vocabulary" if all(0 <= each < 290 for each in ids) else ""


def other_rows(found: Any) -> str:
    """Rows were checked as they were read, and are learned from: see `usable`."""
    return "other texts, or fewer rows, each of them usable"


def other_settings(found: Any) -> str:
    return "another value of the right type and in its range"


def its_own(found: Any) -> str:
    return "made anew where it is damaged"


# --- reading


def opened(path: Path) -> tuple[ModelConfig, str, dict]:
    """Of a model: its config, its head, and of each tensor what tells it from another."""
    source = open_any(path)
    found = {}
    for name, tensor in source.tensors():
        found[name] = (tuple(tensor.shape), tensor.dtype, float(tensor.double().abs().nansum()))
    return source.config, source.head, found


def usable(tokenizer: Tokenizer, rows: list[Any]) -> list[Any]:
    """Rows, after doing with them what training does."""
    for row in rows:
        if isinstance(row, str):
            tokenizer.encode(row)
        elif row.messages[-1]["role"] == "assistant":
            ids, weights = encode_dialogue(tokenizer, row.messages)
            assert len(ids) == len(weights)
        else:
            encode_prompt(tokenizer, row.messages)
    return rows


def ghosts(path: Path) -> list[GhostDialogue]:
    found, _ = read_ghost_dialogues([path], [], 0)
    for ghost in found:
        check_dialogue(
            [
                {"role": "system", "content": ghost.instruction},
                *({"role": "user", "content": turn} for turn in ghost.turns[:1]),
            ]
        )
    return found


def make_targets(folder: Path) -> list[Target]:
    """Every target, whole, each in a folder of its own under `folder`."""
    targets: list[Target] = []
    vocabulary = train_tokenizer(TEXTS, folder / "tokenizer.model", vocab_size=290)
    model = Transformer(SHAPE)
    model.init_weights()
    scorer = Transformer(SHAPE, "score")
    scorer.init_weights()

    def add(name, file, read, mutate, taken) -> None:
        targets.append(Target(name, file, file.read_bytes(), read, read(), mutate, taken))

    def new(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    for name, net in (("lm", model), ("score", scorer)):
        where = folder / f"hf-{name}"
        save_model(where, net, folder / "tokenizer.model")
        read = lambda where=where: opened(where)  # noqa: E731
        add(f"config.json {name}", where / "config.json", read, mutations.json_file, other_numbers)
    where = folder / "hf-lm"
    read = lambda: opened(folder / "hf-lm")  # noqa: E731
    file = where / "model.safetensors"
    add("safetensors", file, read, mutations.safetensors_file, other_weights)
    where = folder / "hf-shards"
    save_model(where, model, folder / "tokenizer.model", shard_bytes=8000)
    read = lambda where=where: opened(where)  # noqa: E731
    file = where / "model.safetensors.index.json"
    add("index.json", file, read, mutations.json_file, lambda found: "")
    for kept_name in ("tokenizer_config.json", "generation_config.json"):
        where = folder / f"hf-{kept_name}"
        save_model(where, model, folder / "tokenizer.model")
        (where / "tokenizer.json").unlink()

        def carried(where: Path = where) -> bool:
            target = where.with_name(f"{where.name}-converted")
            shutil.rmtree(target, ignore_errors=True)
            return convert(where, target).is_dir()

        add(kept_name, where / kept_name, carried, mutations.json_file, lambda found: "")

    convert(folder / "hf-lm", new("llama2c") / "model.bin")
    file = folder / "llama2c" / "model.bin"
    read = lambda: opened(folder / "llama2c" / "model.bin")  # noqa: E731
    add("llama2c header", file, read, mutations.integers, other_numbers)
    add("llama2c bytes", file, read, mutations.damaged, other_weights_or_numbers)

    meta = save_meta(new("meta"), open_any(folder / "hf-lm"))
    read = lambda: opened(folder / "meta")  # noqa: E731
    add("params.json", meta / "params.json", read, mutations.json_file, other_numbers)
    file = meta / "consolidated.00.pth"
    add("consolidated.00.pth", file, read, mutations.damaged, other_weights)

    where = new("tokenizer")
    file = where / "tokenizer.model"
    file.write_bytes((folder / "tokenizer.model").read_bytes())

    def pieces(file: Path = file) -> list[Any]:
        tokenizer = Tokenizer(file)
        ids = tokenizer.encode("hello there 7 \u4e2d", bos=True, eos=True)
        return [tokenizer.decode(ids), *map(tokenizer.piece, range(tokenizer.vocab_size))]

    add("tokenizer.model", file, pieces, mutations.damaged, other_pieces)

    file = new("corpus") / "a.npy"
    texts = file.with_name("texts.jsonl")
    texts.write_text('{"text": "hello there"}\n{"text": "general"}\n')
    encode_file(file, vocabulary, Texts([texts]))

    def corpus(file: Path = file) -> list[int]:
        return [int(token) for shard in open_corpus([file], vocabulary).shards for token in shard]

    add("a.npy", file, corpus, mutations.text_file, other_ids)

    folder = new("corpus-folder") / "corpus"
    encode_folder(folder, vocabulary, Texts([texts]), shard=1)

    def shards(file: Path = folder / INDEX) -> list[int]:
        return corpus(file.parent)

    add("corpus.json", folder / INDEX, shards, mutations.damaged, other_ids)
    add_rows(add, new("rows"), vocabulary)
    add_recipes(add, new("recipes"))
    return targets


def other_weights_or_numbers(found: tuple[ModelConfig, str, dict]) -> str:
    return other_numbers(found) and other_weights(found)


def save_meta(where: Path, source: Source) -> Path:
    share = {}
    for name, tensor in source.tensors():
        heads = rope_heads(name, source.config)
        share[meta_name(name)] = interleaved(tensor, heads) if heads else tensor
    torch.save(share, where / "consolidated.00.pth")
    params = {
        "dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 20,
        "ffn_dim_multiplier": 0.45, "norm_eps": 1e-5, "vocab_size": -1, "rope_theta": 10000.0,
    }  # fmt: skip
    (where / "params.json").write_text(json.dumps(params))
    return where


def add_rows(add: Callable[..., None], where: Path, tokenizer: Tokenizer) -> None:
    """Files of JSON lines, of a user's and of a run's."""
    sample = {
        "messages": [USER], "is_safety": False, "answer": "a", "tokens": [3, 2], "finished": True,
        "score": 1.0, "scores": {"helpfulness": 1.0}, "round": 1, "prompt": 0, "sample": 0,
    }  # fmt: skip
    pair = {"messages": [USER], "is_safety": True, "a": "x", "b": "y", "a_ids": [3], "b_ids": [4]}
    judged = {"rating": "better", "safety": "both_safe", "batch": 1}
    weighed = {"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}]}
    turns = [GhostDialogue("be", "be", ["hello", "hello"])] * 2
    kinds: dict[str, tuple[Callable[[Path], Any], list[dict]]] = {
        "texts": (read_texts, [{"text": "hello there"}]),
        "dialogues": (read_dialogues, [weighed, {"prompt": "hello", "response": "there"}]),
        "preferences": (
            read_preferences,
            [
                {"messages": [USER], "chosen": "a", "rejected": "b", **judged},
                {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "no"}]},
                {"chosen": f"{HUMAN} b", "rejected": f"{HUMAN} c"},
            ],
        ),
        "prompts": (read_prompts, [{"prompt": "hello", "safety": True}, {"messages": [USER]}]),
    }  # fmt: skip
    for name, (read, rows) in kinds.items():
        file = write(where / f"{name}.jsonl", rows * 2)
        both = lambda file=file, read=read: usable(tokenizer, read(file)[0])  # noqa: E731
        add(name, file, both, mutations.json_lines, other_rows)
    own: dict[str, tuple[Callable[[Path], Any], list[dict]]] = {
        "ghosts": (
            ghosts,
            [{"turns": ["a", "b"], "instruction": "be", "short": "b"}]
            + [{"messages": [USER, ANSWER], "instruction": "be"}],
        ),
        "samples": (read_samples, [sample]),
        "pairs": (read_pairs, [pair]),
        "turns": (
            lambda file: exchanges.load_turns(file, turns, SHAPE.vocab_size),
            [{"of": 2, "0": ["hello", [3, 2], True, "be"], "1": ["hello", [3], False, "be"]}],
        ),
    }
    for name, (read, rows) in own.items():
        file = write(where / f"{name}.jsonl", rows * 2)
        one = lambda file=file, read=read: read(file)  # noqa: E731
        add(name, file, one, mutations.json_lines, other_rows)
    file = where / "seconds.json"
    file.write_text('{"data": 1.5, "sft": 2}')
    add("seconds.json", file, lambda: seconds(where), mutations.json_file, its_own)
    cache = where / "persona.json"
    cache.write_text('[["a", "b"], ["c"]]')
    add("persona.json", cache, lambda: kept(cache, list), mutations.json_file, its_own)


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def add_recipes(add: Callable[..., None], where: Path) -> None:
    file = where / "sft.toml"
    file.write_text(
        'base = "base.toml"\nmodel = "m"\nout = "o"\ndata = ["a.jsonl", "b.jsonl"]\nlr = 1e-5\n'
        'epochs = 2\neval_share = 0.1\n\n[columns]\nprompt = "question"\n'
    )
    (where / "base.toml").write_text("seed = 1\nbatch = 8\n")

    def recipe() -> Any:
        return from_values(sft.SFTConfig, load_recipe(sft.SFTConfig, file))

    add("sft.toml", file, recipe, mutations.text_file, other_settings)
