"""Run: python -m pytest tests/test_native.py -q"""

import json
import os
import signal

import pytest
import torch
from engine_peers import SHAPES, build, exact, feed, session_of
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.config import ModelConfig
from puna.core.generation.generate import _by_engine, generate
from puna.core.generation.sampling import Sampler
from puna.core.native import engine as native
from puna.core.native.engine import Engine, engine_for, instruction_sets
from puna.core.native.loader import extension
from puna.core.ops import use_backend

pytestmark = pytest.mark.skipif(extension() is None, reason="the native engine is not built")


@settings(max_examples=20)
@given(steps=st.integers(1, 12), rows=st.integers(1, 40), eos=st.integers(-1, 96))
def test_steps_in_one_call_are_those_of_many(steps, rows, eos):
    model = build(SHAPES[0], seed=7)
    session = session_of(model, rows, steps)
    seeds = torch.arange(steps * rows).view(steps, rows) * 7919
    numbers = torch.arange(rows)
    start = numbers * 3 % 97, numbers, torch.zeros_like(numbers), numbers
    options = dict(temperature=1.0, eos_id=None if eos < 0 else eos)
    tokens, logprobs = session.draw(*start, seeds=seeds, **options)
    session.reserve(rows, steps)
    fed = start[0]
    for step in range(len(tokens)):
        place = torch.full_like(numbers, step)
        one, score = session.draw(
            fed, numbers, place, numbers, seeds=seeds[step : step + 1], **options
        )
        assert torch.equal(one[0], tokens[step]) and torch.equal(score[0], logprobs[step])
        fed = one[0]
    ends = (tokens == eos).any(1)
    assert not ends[:-1].any() and (len(tokens) == steps or ends[-1])


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "base"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_against_fp64(config, name, threads):
    if name not in instruction_sets(config.head_dim):
        pytest.skip(f"no {name} for heads of {config.head_dim} on this machine")
    model = build(config)
    torch.manual_seed(1)
    sequences = [torch.randint(config.vocab_size, (n,)).tolist() for n in (1, 30, 2, 17, 9)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        session = session_of(model, 5, 32, name)
        found = feed(session, sequences)
        again = feed(session, [[3]] * 5, [len(s) for s in sequences])
    finally:
        torch.set_num_threads(before)
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(found[row].double(), exact(model, sequence), rtol=0, atol=1e-5)
        truth = exact(model, [*sequence, 3])
        torch.testing.assert_close(again[row].double(), truth, rtol=0, atol=1e-5)


@settings(max_examples=60)
@given(
    head_dim=st.sampled_from([4, 8, 12, 16, 20, 32, 48, 64]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    ffn=st.integers(1, 70),
    vocabulary=st.integers(1, 150),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=30),
    weights=st.sampled_from(["fp32", "bf16", "int8"]),
    threads=st.integers(1, 4),
    data=st.data(),
)
def test_any_shape(head_dim, kv_heads, group, ffn, vocabulary, lengths, weights, threads, data):
    heads = kv_heads * group
    config = ModelConfig(heads * head_dim, 1, heads, kv_heads, ffn, vocabulary, context=24)
    model = build(config)
    name = data.draw(st.sampled_from(instruction_sets(head_dim)))
    sequences = [torch.randint(vocabulary, (n,)).tolist() for n in lengths]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = feed(session_of(model, len(lengths), 24, name, weights), sequences)
    finally:
        torch.set_num_threads(before)
    pick = data.draw(st.integers(0, len(lengths) - 1))
    truth = exact(model, sequences[pick])
    rounding = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05}[weights]
    torch.testing.assert_close(found[pick].double(), truth, rtol=0, atol=rounding)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_its_neighbours(lengths, seed):
    """To the last bit, fed alone or with others, in one call or token by token."""
    model = build(SHAPES[0])
    torch.manual_seed(seed)
    sequences = [torch.randint(97, (n,)).tolist() for n in lengths]
    session = session_of(model, len(lengths), 20)
    together = feed(session, sequences)
    session.reserve(1, 20)
    alone = feed(session, sequences[:1])
    assert torch.equal(alone[0], together[0])
    for position, token in enumerate(sequences[-1]):
        last = feed(session, [[token]], [position])
    assert torch.equal(last[0], together[-1])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_are_those_of_the_reference(temperature):
    """The same numbers of the same seeds; a draw can differ only next to a boundary."""
    model = build(SHAPES[0], seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # distributions with something to choose
    prompts = [[1, 5 + i, 7] for i in range(40)]
    options = dict(max_new_tokens=20, eos_id=2, temperature=temperature, seed=4)
    with use_backend("native"):
        native = generate(model, prompts, **options)
    with use_backend("reference"):
        reference = generate(model, prompts, **options)
    same = [a.tokens == b.tokens for a, b in zip(native, reference, strict=True)]
    assert sum(same) >= 39
    for a, b in zip(native, reference, strict=True):
        if a.tokens == b.tokens:
            assert a.finished == b.finished
            torch.testing.assert_close(
                torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=2e-5
            )


@settings(max_examples=25)
@given(
    slots=st.integers(1, 9),
    copies=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    limit=st.integers(0, 12),
)
def test_refilled_slots_change_nothing(slots, copies, lengths, limit):
    """Prompts of many lengths, some several times, through few slots: as each one alone."""
    model = build(SHAPES[0], seed=5)
    torch.manual_seed(len(lengths))
    prompts = [torch.randint(97, (n,)).tolist() for n in lengths for _ in range(copies)]
    names = dict(
        prompt_ids=[i // copies for i in range(len(prompts))],
        sample_ids=[i % copies for i in range(len(prompts))],
    )
    options = dict(max_new_tokens=limit, eos_id=11, seed=2)
    with use_backend("native"):
        found = generate(model, prompts, batch_size=slots, **names, **options)
        for i, prompt in enumerate(prompts):
            place = {key: [value[i]] for key, value in names.items()}
            assert found[i] == generate(model, [prompt], **place, **options)[0]


def scale(model):
    with torch.no_grad():
        model.model.norm.weight.mul_(2)


def step(model):
    """Fused AdamW leaves no trace in torch's version counters."""
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[3, 5] = 1.0
    torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, fused=True).step()


def behind_autograd(model):
    model.lm_head.weight.data[-1, -1] += 1


@pytest.mark.parametrize("change", [scale, step, behind_autograd])
def test_the_packed_copy_follows_the_weights(change):
    model = build(SHAPES[0])
    engine = engine_for(model)
    assert engine is engine_for(model)
    change(model)
    changed = engine_for(model)
    assert changed is not engine
    with changed.session(1, 8) as session:
        logits = feed(session, [[1, 2, 3]])[0]
    torch.testing.assert_close(logits.double(), exact(model, [1, 2, 3]), rtol=0, atol=1e-5)


def test_a_model_that_might_fill_the_memory_stays_with_pytorch(monkeypatch, caplog):
    model = build(SHAPES[0])
    size = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(native, "_memory", lambda: 4 * size)
    assert engine_for(model) is not None
    monkeypatch.setattr(native, "_memory", lambda: 4 * size - 1)
    assert engine_for(model) is None and engine_for(model) is None
    assert caplog.text.count("hold them twice") == 1
    with use_backend("native"):
        assert engine_for(model) is not None


def test_what_the_engine_does_not_take():
    mixed = build(SHAPES[0])
    mixed.model.norm.bfloat16()
    assert engine_for(mixed) is None
    half = build(SHAPES[0]).bfloat16()
    assert engine_for(half) is None
    with use_backend("native"), pytest.raises(ValueError, match="bfloat16 on cpu, not float32"):
        engine_for(half)
    odd = build(ModelConfig(12, 1, 2, 2, 8, vocab_size=9, context=8))  # heads of 6
    assert engine_for(odd) is None
    with use_backend("native"), pytest.raises(ValueError, match="its head size is 6"):
        engine_for(odd)
    with use_backend("reference"):
        assert engine_for(build(SHAPES[0])) is None
    with pytest.raises(ValueError, match="instruction set is 'sse9'"):
        Engine(build(SHAPES[0]), "sse9")


def test_bad_input():
    session = session_of(build(SHAPES[0]), 1, 1)
    with pytest.raises(ValueError, match="at least 1 row, and 1 to 96 tokens"):
        session.reserve(0, 8)
    with pytest.raises(ValueError, match="1 to 96 tokens"):
        session.reserve(1, 97)
    session.reserve(2, 8)
    one = torch.zeros(1, dtype=torch.int64)
    good = dict(tokens=one, rows=one, positions=one, wanted=one)
    session.logits(**good)
    cases = [
        ("tokens", one + 97, "tokens holds 97; expected 0 to 96"),
        ("tokens", one - 1, "tokens holds -1"),
        ("rows", one + 2, "rows holds 2; expected 0 to 1"),
        ("positions", one + 8, "positions holds 8; expected 0 to 7"),
        ("wanted", one + 1, "wanted holds 1; expected 0 to 0"),
        ("rows", one.int(), r"rows is torch.int32 \(1,\)"),
        ("rows", torch.zeros(2, dtype=torch.int64), r"rows is torch.int64 \(2,\)"),
        ("positions", torch.zeros(2, 2, dtype=torch.int64)[:, 0], "positions is torch.int64"),
    ]
    for name, value, message in cases:
        with pytest.raises(ValueError, match=message):
            session.logits(**{**good, name: value})
    seeds = torch.zeros(8, 1, dtype=torch.int64)
    session.draw(**good, seeds=seeds, temperature=1.0)
    for value, temperature, message in [
        (seeds.int(), 1.0, r"seeds is torch.int32 \(8, 1\)"),
        (seeds.expand(8, 2), 1.0, r"expected a contiguous int64 \(8, 1\)"),
        (seeds, float("nan"), "temperature is nan; it must be 0"),
        (seeds.new_zeros(9, 1), 1.0, "the cache has no room for 9 steps"),
        (seeds[:0], 1.0, "steps must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            session.draw(**good, seeds=value, temperature=temperature)
    empty = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="wanted holds 0; expected 0 to -1"):
        session.logits(empty, empty, empty, one)
    with pytest.raises(ValueError, match="cannot copy 9 tokens"):
        session.copy_row(0, 1, 9)


def test_a_fork_does_not_hang():
    """OpenMP's threads do not survive a fork: the child works on one."""
    model = build(SHAPES[0])
    options = dict(max_new_tokens=5, eos_id=None, temperature=0.0)
    prompts = [[1 + i] for i in range(40)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with use_backend("native"):
            expected = [c.tokens for c in generate(model, prompts, **options)]
            read, write = os.pipe()
            child = os.fork()
            if not child:
                signal.alarm(60)  # rather killed than waiting for ever
                found = [c.tokens for c in slots_alone(model, prompts)]
                os.write(write, json.dumps(found).encode())
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as pipe:
                assert json.load(pipe) == expected
            assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def slots_alone(model, prompts):
    """Greedy answers by the native engine; torch's own parallel regions would hang in a fork."""
    keys = torch.zeros(len(prompts), dtype=torch.int64)
    engine, sampler = engine_for(model), Sampler(0.0)
    limits = [5] * len(prompts)
    return _by_engine(engine, prompts, keys, limits, sampler, None, 256, None, None)
