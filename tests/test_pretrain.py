"""Run: python -m pytest tests/test_pretrain.py -q"""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from puna.core.checkpoint.folder import load_model
from puna.core.text.tokenizer import Tokenizer, train_tokenizer
from puna.trainers import pretrain
from puna.trainers.data.columns import Columns
from puna.trainers.data.encoding import Texts, encode_corpus, encode_file, encode_folder
from puna.trainers.data.readers import read_texts
from puna.trainers.pretrain import PretrainConfig


def configured(tiny: Path, out: Path, **options) -> PretrainConfig:
    values = {
        "data": [tiny / "text.jsonl"],
        "tokenizer": tiny / "tokenizer.model",
        "context": 48,
        "batch": 4,
        "micro_batch": 2,
        "steps": 12,
        "lr": 3e-3,
        "eval_share": 0.1,
        "eval_every": 6,
        "device": "cpu",
    }
    return PretrainConfig(out=out, **(values | options))


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "run"
    pretrain.run(configured(tiny, out))
    return out


def test_the_held_out_loss_falls(whole):
    held = [row["eval_loss"] for row in metrics(whole) if "eval_loss" in row]
    assert len(held) == 3 and held[0] > 5.5 and held[2] < held[1] < held[0] - 0.5


def test_the_finished_model_has_the_tokenizers_vocabulary_and_the_context_asked_for(tiny, whole):
    model = load_model(whole / "model")
    assert model.config.vocab_size == Tokenizer(tiny / "tokenizer.model").vocab_size
    assert model.config.context == 48 and model.config.dim == 128
    assert (whole / "model" / "tokenizer.model").read_bytes() == (
        tiny / "tokenizer.model"
    ).read_bytes()
    assert pretrain.run(configured(tiny, whole)) == whole / "model"  # done: not trained again


def test_it_goes_on_from_given_weights(tiny, whole, tmp_path):
    options = {"model": whole / "model", "tokenizer": None, "context": 0}
    pretrain.run(configured(tiny, tmp_path / "on", **options))
    before, after = metrics(whole), metrics(tmp_path / "on")
    assert after[0]["eval_loss"] == pytest.approx(before[-1]["eval_loss"], abs=1e-6)
    assert after[-1]["eval_loss"] < after[0]["eval_loss"] - 0.2
    assert after[1]["lr"] == before[1]["lr"]  # a schedule of its own
    model = load_model(tmp_path / "on" / "model")
    assert model.config == load_model(whole / "model").config
    assert (tmp_path / "on" / "model" / "tokenizer.model").read_bytes() == (
        tiny / "tokenizer.model"
    ).read_bytes()
    with pytest.raises(ValueError, match="model is 1 files? where it was|model: .* where it was"):
        pretrain.run(configured(tiny, tmp_path / "on", **options | {"model": tiny / "lm"}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokenizer": None}, "name a --tokenizer, or a --model to go on from"),
        ({"model": "lm", "size": "15m", "context": 0}, "another shape than size 15m; leave it"),
        ({"model": "lm"}, "lm is made for 256 tokens, and context is 48; leave it out"),
        ({"model": "safety", "context": 0}, "safety holds a score head and no lm head"),
        ({"model": "chat-run", "context": 0}, "no model|run's folder|run that is not finished"),
        ({"model": "lm", "tokenizer": "other", "context": 0}, "agrees with the model's own"),
    ],
)
def test_what_does_not_go_together_is_said(tiny, tmp_path, options, said):
    if options.get("tokenizer") == "other":
        draw = random.Random(0)
        texts = ["".join(draw.choices("jkpqvxyz ", k=60)) for _ in range(300)]
        train_tokenizer(texts, tmp_path / "other", vocab_size=330)
        options = options | {"tokenizer": tmp_path / "other"}
    if "model" in options:
        options = options | {"model": tiny / options["model"]}
    with pytest.raises(ValueError, match=said):
        pretrain.run(configured(tiny, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_corpus_of_ids_trains_as_its_texts_do_whatever_the_micro_batch(tiny, whole, tmp_path):
    tokenizer, texts = Tokenizer(tiny / "tokenizer.model"), Texts([tiny / "text.jsonl"])
    encode_file(tmp_path / "text.npy", tokenizer, texts)
    encode_folder(tmp_path / "text", tokenizer, texts)
    for name in ("text.npy", "text"):
        options = {"data": [tmp_path / name], "micro_batch": 4, "steps": 3}
        pretrain.run(configured(tiny, tmp_path / f"run-{name}", **options))
        ours, theirs = metrics(tmp_path / f"run-{name}"), metrics(whole)
        assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], abs=1e-6)
        assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
        assert not (tmp_path / f"run-{name}" / "corpus").exists()
    assert json.loads((whole / "corpus" / "corpus.json").read_text())["complete"]


def test_texts_are_encoded_once(tiny, tmp_path, monkeypatch):
    config, tokenizer = configured(tiny, tmp_path), Tokenizer(tiny / "tokenizer.model")
    run = SimpleNamespace(path=tmp_path)
    first = pretrain.load_corpus(config, run, tokenizer)
    monkeypatch.setattr(Tokenizer, "encode_all", None)
    again = pretrain.load_corpus(config, run, tokenizer)
    assert np.array_equal(first.shards[0], again.shards[0])


def test_what_is_encoded_follows_the_texts_and_their_column(tiny, tmp_path, capsys):
    """Before there is a step, and by amendment; each as in a run that never had others."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    rows = (tiny / "text.jsonl").read_text().splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    both = [{"text": text, "body": f"{text} moon"} for text in texts]
    one.write_text("".join(json.dumps(row) + "\n" for row in both))
    two.write_text("".join(json.dumps(row) + "\n" for row in both[:-9]))
    body = Columns(text="body")

    def tokens(run):
        return json.loads((run / "corpus" / "corpus.json").read_text())["tokens"]

    fresh = configured(tiny, tmp_path / "fresh", data=[one], columns=body, steps=2, save_every=1)
    pretrain.run(fresh)
    refused = configured(tiny, tmp_path / "run", data=[one], eval_share=1e-9)
    with pytest.raises(ValueError):
        pretrain.run(refused)
    assert tokens(tmp_path / "run") != tokens(tmp_path / "fresh")
    pretrain.run(replace(fresh, out=tmp_path / "run"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "fresh")
    assert tokens(tmp_path / "run") == tokens(tmp_path / "fresh")
    for change in ({"columns": Columns()}, {"data": [two], "columns": body}):
        asked = replace(fresh, out=tmp_path / "run", steps=fresh.steps + 1, **change)
        with pytest.raises(ValueError, match="--amend"):
            pretrain.run(asked)
        capsys.readouterr()
        pretrain.run(replace(asked, amend=True))
        assert capsys.readouterr().out.count("it goes on") == 1  # as far into other rows
        fresh = replace(asked, amend=False)
        alone = replace(fresh, out=tmp_path / f"alone-{fresh.steps}")
        pretrain.run(alone)
        assert tokens(tmp_path / "run") == tokens(alone.out)


def test_texts_and_corpora_are_not_mixed(tiny, tmp_path):
    np.save(tmp_path / "a.npy", np.ones(99, np.uint16))
    with pytest.raises(ValueError, match="encode the texts with `puna tokenizer encode`, too"):
        data = [tiny / "text.jsonl", tmp_path / "a.npy"]
        pretrain.run(configured(tiny, tmp_path / "run", data=data))


def test_more_text_than_ranks_would_wait_for_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "MOST_WAITED_FOR", 10)
    monkeypatch.setattr(pretrain.parallel, "world_size", lambda: 2)
    config = configured(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="while 2 ranks wait; encode it with"):
        pretrain.load_corpus(config, None, Tokenizer(tiny / "tokenizer.model"))


def test_the_first_loss_is_that_of_the_freshly_initialised_model(tiny, whole):
    """Each document on its own, BOS and EOS included, by PyTorch's cross-entropy."""
    config = configured(tiny, whole)
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    model = load_model(whole / "model")
    model.init_weights(0)
    corpus = encode_corpus(tokenizer, read_texts(tiny / "text.jsonl")[0])
    (tokens,) = corpus.shards
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    cut = len(tokens) - round(len(tokens) * 0.1)
    total, count = 0.0, 0
    borders = sorted({*starts.tolist(), *range(cut, len(tokens), 48)})
    for begin, end in zip(borders, [*borders[1:], len(tokens)], strict=True):
        if begin < cut:
            continue
        # A row's last token still has its target, unless the document ends there.
        last = end if end == len(tokens) or end in starts else end + 1
        ids = torch.tensor(tokens[begin:last].astype("int64"))
        if len(ids) < 2:
            continue
        logits = model(ids[None, :-1])[0] @ model.lm_head.weight.T
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(ids) - 1
    assert config.seed == 0
    assert metrics(whole)[0]["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_the_seed_decides(tiny, whole, tmp_path):
    pretrain.run(configured(tiny, tmp_path / "a", steps=1))
    pretrain.run(configured(tiny, tmp_path / "b", steps=1, seed=1))
    assert metrics(tmp_path / "a")[1]["loss"] == metrics(whole)[1]["loss"]
    assert metrics(tmp_path / "b")[1]["loss"] != metrics(whole)[1]["loss"]


def test_without_steps_it_is_one_epoch_of_a_text_file(tiny, tmp_path):
    (tmp_path / "book.txt").write_text("red blue green cup tree lamp " * 60)
    options = {"data": [tmp_path / "book.txt"], "steps": 0, "row_tokens": 16, "eval_share": 0.0}
    pretrain.run(configured(tiny, tmp_path / "run", **options))
    tokens = sum(row["tokens"] for row in metrics(tmp_path / "run"))
    ids = Tokenizer(tiny / "tokenizer.model").encode("red blue green cup tree lamp " * 60)
    assert abs(tokens - len(ids)) <= 64 and "eval_loss" not in metrics(tmp_path / "run")[0]


@pytest.mark.parametrize(("text", "share"), [("red blue", 0.01), ("r", 0.9)])
def test_a_text_too_short_to_hold_some_out_is_said_and_trained_on_without(
    tiny, tmp_path, text, share
):
    (tmp_path / "book.txt").write_text(text)
    options = {"data": [tmp_path / "book.txt"], "steps": 1}
    with pytest.raises(ValueError, match="tokens are too few .*; give more text, or --eval-share"):
        pretrain.run(configured(tiny, tmp_path / "run", eval_share=share, **options))
    pretrain.run(configured(tiny, tmp_path / "other", eval_share=0.0, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "8b"}, "unknown model size '8b'; known sizes: 7b"),
        ({"eval_share": 1.0}, "eval_share is 1.0; it is a share of the data"),
        ({"steps": -1}, "steps is -1; it cannot be negative"),
        ({"micro_batch": 0}, "micro_batch is 0; it must be at least 1"),
        ({"row_tokens": 64}, "row_tokens 64 exceeds the model's context of 48"),
        ({"tokenizer": Path("none.model")}, "none.model"),
        ({"data": [Path("none.txt")]}, "none.txt: no such file"),
    ],
)
def test_what_cannot_be_is_one_sentence(tiny, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pretrain.run(configured(tiny, tmp_path / "run", **options))


def test_a_malformed_row_stops_with_its_line(tiny, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "red"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match="bad.jsonl:2: 'text' is 3, expected a string"):
        pretrain.run(configured(tiny, tmp_path / "run", data=[tmp_path / "bad.jsonl"]))
