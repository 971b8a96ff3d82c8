"""Hidden states of some tokens alone: the last layer does no more than they need, and everything
else stays as it was, to the bit. Run: pytest tests/test_wanted.py -q"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.core import parallel
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.native.engine import FORMATS, Engine
from puna.core.native.loader import extension
from puna.core.packed import flat_sequences
from puna.core.shared import in_twos
from puna.trainers.data.packing import PackedRows
from puna.trainers.train.next_token import next_token_loss, to_device

CONFIG = ModelConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48)
LENGTHS = st.lists(st.integers(1, 30), min_size=2, max_size=5)
native = pytest.mark.skipif(extension() is None, reason="the native engine is not built")


def model_of(dtype=torch.float32, head="lm", config=CONFIG) -> Transformer:
    model = Transformer(config, head)
    model.init_weights(seed=1)
    return model.to(dtype)


def some_of(data, count: int) -> torch.Tensor:
    """Numbers below `count`, any number of them, in any order."""
    return torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=12)), dtype=int)


@given(LENGTHS, st.data())
@settings(max_examples=40, deadline=None)
def test_states_are_those_among_all_to_the_bit(lengths, data):
    torch.manual_seed(sum(lengths))
    sequences = [torch.randint(64, (length,)).tolist() for length in lengths]
    tokens, positions, cu_seqlens = flat_sequences(sequences)
    wanted = some_of(data, tokens.numel())
    model = model_of()
    with torch.no_grad():
        whole = model(tokens, positions, cu_seqlens)[0]
        assert torch.equal(model(tokens, positions, cu_seqlens, wanted=wanted)[0], whole[wanted])


def test_rows_are_counted_on():
    rows, wanted = torch.randint(64, (3, 7)), torch.tensor([0, 20, 6, 7])
    model = model_of()
    with torch.no_grad():
        assert torch.equal(model(rows, wanted=wanted)[0], model(rows).flatten(0, 1)[wanted])


@given(LENGTHS, st.data())
@settings(max_examples=25, deadline=None)
def test_gradients_are_those_of_picking_out_afterwards(lengths, data):
    torch.manual_seed(sum(lengths))
    flat = flat_sequences([torch.randint(64, (length,)).tolist() for length in lengths])
    wanted = some_of(data, sum(lengths))
    found = []
    for early in (False, True):
        model = model_of(torch.float64)
        picked = model(*flat, wanted=wanted)[0] if early else model(*flat)[0][wanted]
        picked.square().sum().backward()
        found.append([p.grad for p in model.model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wanted", [[0], [2, 0], [1, 1, 2]])
def test_a_step_of_decoding_is_multiplied_as_one(wanted):
    """Prompts of one token side by side, and one alone."""
    model = model_of()
    for rows in (torch.tensor([[5], [6], [7]]), torch.tensor([[5]])):
        numbers = torch.tensor(wanted) % len(rows)
        with torch.no_grad():
            assert torch.equal(model(rows, wanted=numbers)[0], model(rows)[numbers, 0])


def test_nothing_wanted_has_a_gradient_of_zero():
    model = model_of()
    model(torch.arange(6)[None], wanted=torch.empty(0, dtype=int)).sum().backward()
    assert all(not p.grad.any() for p in model.model.parameters())


def test_one_alone_is_a_tensor_of_its_own():
    """FSDP2 warns of views."""
    assert not model_of()(torch.arange(6)[None], wanted=torch.tensor([3]))._is_view()


def test_compiled_blocks_are_of_any_number(monkeypatch):
    """Numbers of sequences and of wanted tokens that change, and all or none wanted, with and
    without gradients, are two graphs each."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiling = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiling)
    model = parallel.prepare(model_of(), compile=True)
    for count in (3, 2, 5, 4):
        tokens, positions, _ = flat_sequences([list(range(20))])
        cuts = torch.tensor([*range(count), 20], dtype=torch.int32)
        for wanted in (torch.arange(2 * count), None, torch.tensor([count])):
            found = model(tokens, positions, cuts, wanted=wanted)
            found.sum().backward()
            with torch.no_grad():
                torch.testing.assert_close(model(tokens, positions, cuts, wanted=wanted), found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    torch._dynamo.reset()


def test_with_what_two_sequences_share():
    sides = in_twos([[1, 2, 3, 4], [1, 2, 5], [6, 7], [6, 7, 8]])
    model = model_of(head="score")
    flat = sides.tokens, sides.positions, sides.cu_seqlens
    with torch.no_grad():
        whole = model(*flat, shared=sides.shared)[0]
        few = model(*flat, shared=sides.shared, wanted=sides.last)[0]
    assert torch.equal(few, whole[sides.last])


def test_what_is_not_learned_is_not_finished():
    """A batch of packed rows says which tokens count, and the loss and its gradient are those of
    all tokens; where nearly all count nothing is picked out."""
    masked = [(list(range(1, 20)), [0.0] * 12 + [1.0] * 7), (list(range(5, 15)), [0.0] + [0.5] * 9)]
    batch = PackedRows(masked, 32, vocab_size=64).batch([0])
    assert batch.wanted.tolist() == batch.weights.flatten().nonzero()[:, 0].tolist()
    found = []
    for each in (batch, batch._replace(wanted=None)):
        model = model_of(torch.float64)
        loss, _ = next_token_loss(model, to_device(each, torch.device("cpu")))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    whole = [(list(range(33)), [1.0] * 33)]
    assert PackedRows(whole, 32, vocab_size=64).batch([0]).wanted is None


SHAPES = [
    ModelConfig(64, 2, 4, 2, 176, vocab_size=97, context=256),
    ModelConfig(288, 1, 6, 6, 768, vocab_size=131, context=256),
]


@native
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_engine_leaves_the_same_cache(config, kind, threads):
    """Rows of many tokens and of few; blocks in which all, some, the first, the last or none are
    wanted; then one more token in each row, which reads what the others left in every layer."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    engine = Engine(model_of(config=config), weight_format=kind)
    torch.manual_seed(threads)
    lengths = [1, 130, 20, 3, 97, 15]
    count = sum(lengths)
    tokens = torch.randint(config.vocab_size, (count,))
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    ends = torch.tensor(lengths).cumsum(0) - 1
    more = torch.randint(config.vocab_size, (len(lengths),))

    def run(wanted):
        with engine.session(len(lengths), 200) as session:
            said = session.logits(tokens, rows, positions, wanted)
            every = torch.arange(len(lengths))
            return said, session.logits(more, every, torch.tensor(lengths), every)

    try:
        whole, after = run(torch.arange(count))
        for wanted in (
            ends, ends.flip(0), ends[1:2], torch.tensor([5, 5, 140, 1]), torch.tensor([0, 131]),
            torch.randperm(count)[:40], torch.empty(0, dtype=torch.int64),
        ):  # fmt: skip
            said, later = run(wanted)
            assert torch.equal(said, whole[wanted])
            assert torch.equal(later, after)
    finally:
        torch.set_num_threads(before)
