"""Conversations whose earlier turns are not run again.

Run: python -m pytest tests/test_memory.py -q
"""

import random
import threading

import pytest
import torch

from puna.core.config import ModelConfig
from puna.core.generation.generate import generate, stream
from puna.core.generation.memory import Memory
from puna.core.model import Transformer
from puna.core.native.loader import extension
from puna.core.native.session import Session

CONFIG = ModelConfig(32, 2, 4, 2, 48, vocab_size=23, context=160)
EOS = 2
needs_engine = pytest.mark.skipif(extension() is None, reason="the native engine is not built")


@pytest.fixture(scope="module")
def model():
    return made(0)


def made(seed):
    network = Transformer(CONFIG)
    network.init_weights(seed)
    with torch.no_grad():
        network.lm_head.weight.mul_(15)  # far from ties: rounding decides nothing
    return network


@pytest.fixture
def fed(monkeypatch):
    """How many tokens each call of the engine ran."""
    counts: list[int] = []
    forward = Session._forward

    def counting(self, tokens, *rest):
        done = forward(self, tokens, *rest)
        counts.append(tokens.numel())
        return done

    monkeypatch.setattr(Session, "_forward", counting)
    return counts


def talk(model, memory, *, rows=3, turns=4, samples=1, seed=0, **options):
    """Answers by turn, of so many conversations, each turn with another question."""
    draw = random.Random(seed)
    contexts = [[1, row + 3] for row in range(rows) for _ in range(samples)]
    names = [(row, sample) for row in range(rows) for sample in range(samples)]
    said = []
    for turn in range(turns):
        asked = [[draw.randrange(3, 23) for _ in range(draw.randint(1, 9))] for _ in range(rows)]
        contexts = [c + asked[row] for c, (row, _) in zip(contexts, names, strict=True)]
        settings = {"max_new_tokens": 8, "temperature": 0.9, "eos_id": EOS} | options
        found = generate(
            model,
            contexts,
            round_index=turn,
            prompt_ids=[row for row, _ in names],
            sample_ids=[sample for _, sample in names],
            memory=memory,
            **settings,
        )
        said.append(found)
        contexts = [c + each.tokens for c, each in zip(contexts, found, strict=True)]
    return said


def same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert [each.tokens for each in mine] == [each.tokens for each in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a.finished == b.finished
            torch.testing.assert_close(
                torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=2e-5
            )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"batch_size": 2}, {"temperature": 0.0}])
def test_the_same_answers_as_without(model, samples, options, seed):
    given = {"samples": samples, "seed": seed, **options}
    same(talk(model, Memory(), **given), talk(model, None, **given))


def test_the_same_answers_where_the_cache_is_small(model):
    given = {"rows": 7, "samples": 2, "cache_bytes": 60_000}
    same(talk(model, Memory(), **given), talk(model, None, **given))


@needs_engine
def test_a_turn_runs_its_new_tokens_only(model, fed):
    memory = Memory()
    prompt = [1, *range(3, 23), *range(3, 23)]
    (first,) = generate(model, [prompt], max_new_tokens=5, eos_id=None, memory=memory)
    del fed[:]
    longer = prompt + first.tokens + [7, 8, 9]
    generate(model, [longer], max_new_tokens=1, eos_id=None, memory=memory)
    assert sum(fed) == 4  # the last token was drawn and never run
    del fed[:]
    generate(model, [longer], max_new_tokens=1, eos_id=None)
    assert sum(fed) == len(longer)


@needs_engine
@pytest.mark.parametrize("turned", [1, 20, 40, 43])
def test_another_past_is_run_from_where_it_differs(model, fed, turned):
    memory = Memory()
    prompt = [1, *range(3, 23), *range(3, 23)]
    generate(model, [prompt], max_new_tokens=5, eos_id=None, memory=memory)
    other = [*prompt, 5, 6, 7][:turned] + [22, 4, 3]
    del fed[:]
    (mine,) = generate(model, [other], max_new_tokens=6, eos_id=None, memory=memory)
    assert fed[0] <= max(3, len(other) - min(turned, 40))
    (theirs,) = generate(model, [other], max_new_tokens=6, eos_id=None)
    assert mine.tokens == theirs.tokens


@needs_engine
def test_a_conversation_alone_finds_its_place_among_many(model, fed):
    memory = Memory()
    prompts = [[1, row + 3, *range(3, 20)] for row in range(9)]
    generate(model, prompts, max_new_tokens=3, eos_id=None, memory=memory)
    del fed[:]
    told = {"max_new_tokens": 1, "eos_id": None, "memory": memory}
    generate(model, [[*prompts[7], 4]], prompt_ids=[7], **told)
    assert sum(fed) <= 2
    generate(model, [[*prompts[2], 4]], prompt_ids=[2], **told)
    assert sum(fed) <= 4


def test_conversations_of_one_name_do_no_harm(model):
    memory = Memory()
    told = {"max_new_tokens": 4, "eos_id": None, "temperature": 0.0, "batch_size": 2}
    for turn in range(3):
        prompts = [[1, row + 3, 9, *range(3, 4 + turn)] for row in range(5)]
        given = {"prompt_ids": [0, 0, 1, 0, 1], **told}
        mine = generate(model, prompts, memory=memory, **given)
        assert [c.tokens for c in mine] == [c.tokens for c in generate(model, prompts, **given)]


def test_other_weights_forget(model):
    memory = Memory()
    talk(model, memory)
    other = made(1)
    same(talk(other, memory), talk(other, None))
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    same(talk(other, memory), talk(other, None))


def test_a_stream_remembers_as_far_as_it_was_read(model):
    for read in (1, 4, 9):
        memory = Memory()
        prompt = [1, 5, 9, 11]
        settings = {"max_new_tokens": 9, "eos_id": None, "temperature": 0.0}
        drawn = stream(model, prompt, memory=memory, **settings)
        said = [next(drawn) for _ in range(read)]
        drawn.close()
        asked = prompt + said + [3, 4]
        assert list(stream(model, asked, memory=memory, **settings)) == list(
            stream(model, asked, **settings)
        )


def test_what_failed_is_not_remembered(model):
    memory = Memory()
    told = {"max_new_tokens": 4, "eos_id": None, "temperature": 0.0}
    broken = made(2)
    generate(broken, [[1, 5, 6]], memory=memory, **told)
    kept = broken.lm_head.weight.detach().clone()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        generate(broken, [[1, 5, 6, 9, 9]], memory=memory, **told)
    with torch.no_grad():
        broken.lm_head.weight.copy_(kept)
    asked = [[1, 5, 6, 9, 8]]
    assert (
        generate(broken, asked, memory=memory, **told)[0].tokens
        == generate(broken, asked, **told)[0].tokens
    )


def test_the_reference_takes_a_memory_and_runs_all(model):
    from puna.core.ops import use_backend

    with use_backend("reference"):
        same(talk(model, Memory()), talk(model, None))


def test_one_name_for_several_prompts_keeps_what_stands_in_its_slot(model):
    memory = Memory()
    told = {"max_new_tokens": 8, "eos_id": EOS, "temperature": 0.9}
    a, b = [1] + [5] * 20, [1] + [7] * 20  # the two alike are run before the other
    generate(model, [a, b, a], prompt_ids=[0, 0, 0], memory=memory, **told)
    for prompt in ([*a, 3, 4], [*b, 3, 4]):
        assert (
            generate(model, [prompt], memory=memory, **told)[0].tokens
            == generate(model, [prompt], **told)[0].tokens
        )


@needs_engine
@pytest.mark.parametrize("second", [[1] + [9] * 12, [1] + [9] * 90])
def test_a_stream_goes_on_only_while_the_memory_is_its_own(model, second):
    memory = Memory()
    told = {"max_new_tokens": 10, "eos_id": None, "temperature": 0.0}
    first = stream(model, [1, 5, 5, 5], memory=memory, **told)
    next(first)
    other = stream(model, second, memory=memory, **told)
    said = [next(other)]
    with pytest.raises(RuntimeError, match="another call has taken this memory"):
        next(first)
    assert [*said, *other] == list(stream(model, second, **told))


@needs_engine
def test_threads_with_one_memory_answer_right_or_raise(model):
    memory, wrong = Memory(), []

    def talking(row):
        for turn in range(20):
            prompt = [1] + [row + 3] * 10 + [4] * (1 + turn % 5)
            given = {"max_new_tokens": 8, "eos_id": EOS, "prompt_ids": [row], "round_index": turn}
            try:
                (mine,) = generate(model, [prompt], memory=memory, **given)
            except RuntimeError as error:
                wrong.extend([] if "this memory" in str(error) else [error])
            else:
                (theirs,) = generate(model, [prompt], **given)
                wrong.extend([] if mine.tokens == theirs.tokens else [(row, turn)])

    threads = [threading.Thread(target=talking, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
