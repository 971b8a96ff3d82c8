"""Pretraining: next-token prediction on plain text (paper section 2).

Documents are encoded with BOS and EOS and laid end to end in rows; attention never crosses a
document's border.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from puna.core import parallel
from puna.core.checkpoint.folder import check_own, check_vocabulary, open_model, tokenizer_path
from puna.core.checkpoint.source import Source, fresh
from puna.core.config import ModelConfig, size
from puna.core.documents import count_of
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.capacity import fitting
from puna.trainers.data.columns import Reading
from puna.trainers.data.corpus import Corpus, is_corpus, open_corpus, split_corpus
from puna.trainers.data.encoding import Texts, encode_folder
from puna.trainers.data.packing import CorpusRows
from puna.trainers.train import loop, next_token
from puna.trainers.train.command import command
from puna.trainers.train.kinds import FIXED
from puna.trainers.train.plan import of_epochs, of_steps
from puna.trainers.train.ranges import CountOrZero, ShareOf
from puna.trainers.train.run import Run, open_run
from puna.trainers.train.starting import open_start

SMALLEST = "mini"
MOST_WAITED_FOR = 500_000_000  # bytes of text: some minutes, less than a collective's timeout


@dataclass(kw_only=True)
class PretrainConfig(loop.HeldOutConfig, Reading):
    """Train a language model on text, from scratch or from given weights."""

    data: list[Path]
    """.txt (one document a file) and files of rows with `text`; or corpora of ids, .npy files and
    folders, that `puna tokenizer encode` wrote"""
    tokenizer: Path | None = None
    """tokenizer.model; its vocabulary is the model's. Left out: that of `model`"""
    model: Path | None = None
    """language model whose weights to go on from, with an optimizer and a schedule of its own; left
    out: fresh weights"""
    size: Annotated[str, FIXED] = SMALLEST
    """model shape: 7b, 13b, 34b, 70b, or a small one (15m, 110m, 1b, demo, mini)"""
    context: Annotated[CountOrZero, FIXED] = 0
    """longest sequence the model is made for, tokens; 0 takes the shape's own"""
    row_tokens: CountOrZero = 0
    """tokens in a training row; 0 takes the context (paper: 4096)"""
    batch: int = 8
    """rows in a step, all processes together (paper: 4M tokens)"""
    steps: CountOrZero = 0
    """optimizer steps; 0 takes one epoch"""
    eval_share: Annotated[float, ShareOf(), FIXED] = 0.01
    """share of the tokens, the last ones, kept for the held-out loss"""

    def check(self) -> None:
        if self.model is None and self.tokenizer is None:
            raise ValueError("name a --tokenizer, or a --model to go on from")


def run(config: PretrainConfig) -> Path:
    """Train, or continue, the run in `config.out`; returns the finished model's folder."""
    tokenizer = tokenizer_of(config)
    with open_run(config, tokenizer=tokenizer.path) as folder:
        return folder.final if folder.done else fit(config, folder, tokenizer)


def fit(config: PretrainConfig, folder: Run, tokenizer: Tokenizer) -> Path:
    """What there is still to do in an open run."""
    fitting.check("pretrain", config, config.model or size(config.size))
    source = new_model(config, folder, tokenizer.vocab_size)
    row_tokens = next_token.row_length(config.row_tokens, source.config.context)
    corpus = load_corpus(config, folder, tokenizer)
    training, held = corpus, None
    if config.eval_share > 0:
        training, held = split_corpus(corpus, config.eval_share)
    rows = CorpusRows(training, row_tokens)
    if config.steps:
        plan = of_steps(len(rows), config.steps, config.batch, folder)
    else:
        plan = of_epochs(len(rows), 1, config.batch, folder)
    return next_token.train(
        "pretrain",
        folder,
        source,
        rows,
        config,
        plan=plan,
        what=f"{count_of(training.size, 'token')} in {count_of(len(rows), 'row')} of "
        f"{row_tokens:,}",
        eval_rows=CorpusRows(held, row_tokens) if held is not None else None,
        eval_every=config.eval_every,
    )


def tokenizer_of(config: PretrainConfig) -> Tokenizer:
    """The one named, or that of the model; ValueError where the model is none to go on from, or
    was trained with another one."""
    if config.model is None:
        assert config.tokenizer is not None  # `check` has seen to it
        return Tokenizer(config.tokenizer)
    own = tokenizer_path(config.model)
    if config.tokenizer is not None:
        check_own(config.tokenizer, own)
    source = open_model(config.model, head="lm")
    check_shape(config, source.config)
    return check_vocabulary(config.tokenizer or own, source.config.vocab_size)


def check_shape(config: PretrainConfig, given: ModelConfig) -> None:
    """ValueError where the options ask for another shape than that of the model."""
    asked = replace(size(config.size), vocab_size=given.vocab_size, context=given.context)
    if config.size != SMALLEST and asked != given:
        raise ValueError(f"{config.model} has another shape than size {config.size}; leave it out")
    if config.context not in (0, given.context):
        raise ValueError(
            f"{config.model} is made for {given.context} tokens, and context is {config.context}; "
            "leave it out"
        )


def new_model(config: PretrainConfig, folder: Run, vocab_size: int) -> Source:
    """The weights of the run's newest checkpoint, of the model to go on from, or fresh ones."""
    start = config.model or config.out
    if folder.checkpoint is not None or config.model is not None:
        return open_start(folder, start, head="lm")
    shape = replace(size(config.size), vocab_size=vocab_size)
    if config.context:
        shape = replace(shape, context=config.context)
    return fresh(shape, config.seed)


def load_corpus(config: PretrainConfig, folder: Run, tokenizer: Tokenizer) -> Corpus:
    """What `data` names, mapped into memory; texts are encoded once, into the run's folder."""
    ids = [path for path in config.data if is_corpus(path)]
    if len(ids) == len(config.data):
        return open_corpus(ids, tokenizer)
    if ids:
        raise ValueError(
            f"data names texts and the corpus {ids[0]}; encode the texts with `puna tokenizer "
            "encode`, too"
        )
    if parallel.world_size() > 1:
        size = Texts(config.data).size()
        if size > MOST_WAITED_FOR:
            raise ValueError(
                f"{size / 1e9:.1f} GB of text would be encoded while {parallel.world_size()} ranks "
                "wait; encode it with `puna tokenizer encode` and train on that"
            )
    encoded = folder.path / "corpus"
    parallel.on_main(lambda: encode(encoded, tokenizer, Texts(config.data, config)))
    return open_corpus([encoded], tokenizer)


def encode(folder: Path, tokenizer: Tokenizer, texts: Texts) -> None:
    """Into the run's own folder: that the texts may change, whoever opened the run has said."""
    next_token.say(encode_folder(folder, tokenizer, texts, anew=True).skipped)


def main() -> int:
    return command("python -m puna.trainers.pretrain", PretrainConfig, run)


if __name__ == "__main__":
    sys.exit(main())
