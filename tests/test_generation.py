"""Run: python -m pytest tests/test_generation.py -q"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core.config import ModelConfig
from puna.core.generation import slots
from puna.core.generation.generate import generate, stream
from puna.core.generation.kv_cache import KVCache
from puna.core.model import Transformer
from puna.core.native.loader import extension
from puna.core.native.session import Session
from puna.core.ops import linear_logprobs, use_backend

CONFIG = ModelConfig(32, 2, 4, 2, 48, vocab_size=23, context=40)
EOS = 2
PROMPTS = [[1, 5, 6], [1], [1, 5, 6, 7, 8, 9, 10, 3], [4, 11], [1, 7, 7, 9, 12], [1, 13]]


@pytest.fixture(scope="module", autouse=True, params=["reference", "native"])
def backend(request):
    """Everything here holds for PyTorch and for the native engine."""
    if request.param == "native" and extension() is None:
        pytest.skip("the native engine is not built")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def model():
    made = Transformer(CONFIG)
    made.init_weights(0)
    with torch.no_grad():
        made.lm_head.weight.mul_(15)  # far from uniform, and from ties
    return made


def run(model, prompts=PROMPTS, **options):
    settings = {"max_new_tokens": 12, "eos_id": EOS, "temperature": 0.9}
    return generate(model, prompts, **{**settings, **options})


def same(found, expected):
    """Tokens and endings equal, log-probs to 1e-5: CPU matmuls are not bitwise batch-invariant."""
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert [c.finished for c in found] == [c.finished for c in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@torch.no_grad()
def without_cache(model, prompt, new, eos_id=EOS):
    """Greedy, running the whole text again for every token."""
    text = list(prompt)
    while len(text) < len(prompt) + new and len(text) < CONFIG.context:
        text.append(int(model.logits(model(torch.tensor([text]))[0, -1]).argmax()))
        if text[-1] == eos_id:
            break
    return text[len(prompt) :]


@pytest.mark.parametrize("eos_id", [EOS, None])
def test_greedy_with_the_cache_as_without(model, eos_id):
    found = run(model, temperature=0.0, eos_id=eos_id)
    expected = [without_cache(model, prompt, 12, eos_id) for prompt in PROMPTS]
    assert [c.tokens for c in found] == expected


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.0}])
def test_in_a_batch_as_alone(model, options):
    together = run(model, **options)
    alone = [run(model, [p], prompt_ids=[i], **options)[0] for i, p in enumerate(PROMPTS)]
    same(together, alone)


@settings(max_examples=10)
@given(order=st.permutations(range(len(PROMPTS))), batch_size=st.integers(1, 7))
def test_draws_do_not_depend_on_order_or_batch_size(order, batch_size):
    made = Transformer(CONFIG)
    made.init_weights(0)
    with torch.no_grad():
        made.lm_head.weight.mul_(15)
    expected = run(made)
    found = run(made, [PROMPTS[i] for i in order], prompt_ids=list(order), batch_size=batch_size)
    same(found, [expected[i] for i in order])


A_TOKEN = 2 * 2 * 2 * 8 * 4  # bytes: keys and values, layers, heads, head size, fp32


@pytest.mark.parametrize("tokens", [1, 21, 40, 100])
def test_draws_do_not_depend_on_the_memory_they_may_take(model, backend, monkeypatch, tokens):
    expected = run(model)
    held = []

    def noted(kind, size):
        def made(self, *arguments, **options):
            held.append(size(*arguments))
            return original(self, *arguments, **options)

        original = getattr(kind, "__init__" if kind is KVCache else "reserve")
        monkeypatch.setattr(kind, original.__name__, made)

    noted(KVCache, lambda config, batch, longest: batch * longest)
    noted(Session, lambda rows, longest: rows * longest)
    same(run(model, cache_bytes=A_TOKEN * tokens), expected)
    assert held and max(held) <= max(tokens, len(PROMPTS[2]) + 12)


@pytest.mark.parametrize("tokens", [1, 8, 17])
def test_prompts_are_run_in_pieces(model, backend, monkeypatch, tokens):
    """As on a GPU: no second cache of more than so many tokens, or of one prompt."""
    if backend == "native":
        pytest.skip("the engine runs prompts in pieces of its own")
    given = [prompt for prompt in PROMPTS for _ in range(3)]
    expected, held = run(model, given), []
    original = KVCache.__init__

    def noted(self, config, batch, longest, **options):
        held.append((batch, longest))
        original(self, config, batch, longest, **options)

    monkeypatch.setattr(KVCache, "__init__", noted)
    monkeypatch.setattr(slots, "most_tokens", lambda device: tokens)
    same(run(model, given), expected)
    (cache, *pieces) = held
    assert cache[0] == len(given) and sum(batch for batch, _ in pieces) == len(PROMPTS)
    assert all(batch == 1 or batch * longest <= tokens for batch, longest in pieces)


def test_pieces_of_prompts():
    prompts = [[1], [1], [2, 3], [2, 3], [4, 5], [6] * 9, [7]]
    placed = [(9 - number, number) for number in range(7)]
    found = [[number for _, number in part] for part in slots.pieces(placed, prompts, 4)]
    assert found == [[0, 1, 2, 3], [4], [5], [6]]
    assert [len(part) for part in slots.pieces(placed, prompts, 10**9)] == [7]


def test_seed_round_prompt_and_sample_each_change_the_draw(model):
    prompt = [[1, 5, 6]]
    variants = [
        run(model, prompt),
        run(model, prompt, seed=1),
        run(model, prompt, round_index=1),
        run(model, prompt, prompt_ids=[1]),
        run(model, prompt, sample_ids=[1]),
    ]
    assert len({tuple(v[0].tokens) for v in variants}) == 5
    same(run(model, prompt), variants[0])


def test_logprobs_are_those_of_a_second_pass(model):
    """linear_logprobs over prompt and answer, as PPO forms them."""
    for options in ({}, {"top_k": 4, "top_p": 0.8}):
        for prompt, done in zip(PROMPTS, run(model, **options), strict=True):
            text = torch.tensor([prompt + done.tokens])
            hidden = model(text)[:, len(prompt) - 1 : -1]
            answer = text[:, len(prompt) :]
            again, _ = linear_logprobs(hidden, model.head_weight, answer, temperature=0.9)
            assert done.logprobs == pytest.approx(again[0].tolist(), abs=1e-5)


def test_greedy_logprobs_are_those_of_temperature_one(model):
    done = run(model, [[1, 5]], temperature=0.0)[0]
    text = torch.tensor([[1, 5, *done.tokens]])
    again, _ = linear_logprobs(model(text)[:, 1:-1], model.head_weight, text[:, 2:])
    assert done.logprobs == pytest.approx(again[0].tolist(), abs=1e-5)


def test_eos_ends_an_answer_and_is_part_of_it(model):
    answers = run(model, PROMPTS * 6, prompt_ids=list(range(36)))
    endings = {c.finished for c in answers}
    assert endings == {True, False}  # the case is met
    for done in answers:
        assert len(done.tokens) == len(done.logprobs) <= 12
        assert EOS not in done.tokens[:-1]
        assert done.finished == (done.tokens[-1] == EOS)
        assert done.finished or len(done.tokens) == 12
        assert all(p <= 0 for p in done.logprobs)


def test_without_an_eos_nothing_finishes(model):
    for done in run(model, eos_id=None):
        assert len(done.tokens) == 12 and not done.finished


def test_an_answer_ends_with_the_context(model):
    prompts = [[1] * 39, [1] * 35, [1] * 3]
    lengths = [len(c.tokens) for c in run(model, prompts, max_new_tokens=99, eos_id=None)]
    assert lengths == [1, 5, 37]
    done = run(model, [[1] * 30], max_new_tokens=99, eos_id=None, temperature=0.0)[0]
    assert done.tokens == without_cache(model, [1] * 30, 99, None)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.5, "seed": 4}])
def test_stream_is_generate(model, options):
    for prompt in PROMPTS:
        settings = {"max_new_tokens": 12, "eos_id": EOS, **options}
        assert (
            list(stream(model, prompt, **settings))
            == generate(model, [prompt], **settings)[0].tokens
        )


def test_stream_gives_each_token_as_it_is_drawn(model, backend, monkeypatch):
    passes = []
    draw = Session.draw
    handle = None
    if backend != "native":  # a model with a hook does not go to the engine
        handle = model.register_forward_hook(lambda *_: passes.append(1))

    def counted(*args, seeds, **options):
        passes.extend([1] * len(seeds))
        return draw(*args, seeds=seeds, **options)

    monkeypatch.setattr(Session, "draw", counted)
    try:
        tokens = stream(model, [1, 5], max_new_tokens=5, eos_id=None)
        for drawn in range(1, 4):
            next(tokens)
            assert len(passes) == drawn
    finally:
        if handle is not None:
            handle.remove()


def test_nothing_to_do(model):
    assert run(model, []) == []
    for done in run(model, max_new_tokens=0):
        assert done.tokens == [] and done.logprobs == [] and not done.finished
    assert list(stream(model, [1], max_new_tokens=0, eos_id=None)) == []


def test_the_model_still_trains_afterwards():
    made = Transformer(CONFIG)
    made.init_weights(0)
    run(made)
    made(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]])).sum().backward()


def test_bad_input(model):
    cases = [
        ({"prompts": [[1], []]}, "prompt 1 has 0 tokens"),
        ({"prompts": [[1] * 40]}, "prompt 0 has 40 tokens; .* context of 40"),
        ({"prompts": [[1, 23]]}, "prompt 0 holds token 23; the model knows 0 to 22"),
        ({"prompts": [[-1]]}, "prompt 0 holds token -1"),
        ({"prompt_ids": [1]}, "1 prompt_ids for 6 prompts"),
        ({"sample_ids": [0] * 7}, "7 sample_ids for 6 prompts"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be at least 0"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 "),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            run(model, **options)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        list(stream(model, [], max_new_tokens=3, eos_id=None))
    with pytest.raises(ValueError, match="a model with an 'lm' head"):
        run(Transformer(CONFIG, head="score"))
