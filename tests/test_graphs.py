"""Steps of sampling as CUDA graphs. Without a GPU a stand-in records and replays the operations:
what Python decides anew at a step, or reads from a tensor, would show.

Run: python -m pytest tests/test_graphs.py -q
"""

from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import replayed
import torch
from torch import nn

from puna.core import ops
from puna.core.config import ModelConfig
from puna.core.generation import graphs, slots
from puna.core.generation.generate import generate, stream
from puna.core.model import Rotary, Transformer
from puna.core.ops import use_backend

SHAPE = ModelConfig(64, 2, 4, 2, 96, vocab_size=211, context=400)
EOS = 7
SETTINGS = [{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}]


def model_of(device="cpu", dtype=torch.float32):
    model = Transformer(SHAPE)
    model.init_weights(seed=3)
    with torch.no_grad():
        model.head_weight.mul_(30)
    return model.to(device, dtype)


def prompts(count, longest=20):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(SHAPE.vocab_size, (n,), generator=draw).tolist() for n in lengths]


def same(found, expected):
    """Sums over more of the cache, masked, are rounded otherwise."""
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert [each.finished for each in found] == [each.finished for each in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.fixture
def recorded(monkeypatch):
    """Graphs where there is no GPU. As there, no lengths or positions are looked at."""
    seen = Mock(captured=0, replays=0)

    def captured(work, *rest):
        seen.captured += 1
        replay = replayed.captured(work)

        def counted():
            seen.replays += 1
            replay()

        return counted

    def attend(q, k_cache, v_cache, lengths, **_):
        visible = torch.arange(k_cache.shape[1], device=q.device) < lengths[:, None]
        return nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k_cache, v_cache)),
            attn_mask=visible[:, None, None], enable_gqa=True,
        ).transpose(1, 2)  # fmt: skip

    def rotary(self, tokens, positions):
        if positions is None:
            return checked(self, tokens, positions)
        return Rotary(*(table[positions] for table in self.rope_tables(tokens.device)))

    checked = Transformer.rotary
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "launched_aside", lambda work, device: work())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(slots, "replays", lambda model: True)
    monkeypatch.setattr(slots, "ROOM", 16)
    monkeypatch.setattr("puna.core.ops.decode_attention", attend)
    monkeypatch.setattr(Transformer, "rotary", rotary)
    with use_backend("reference"):
        yield seen


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_replayed_answers_are_those_of_steps(recorded, monkeypatch, options, batch_size):
    """Prompts take the place of answers that end, lengths pass a graph's room, slots become
    fewer."""
    model, given = model_of(), prompts(9)
    options = {"max_new_tokens": 30, "eos_id": EOS, "batch_size": batch_size, **options}
    found = generate(model, given, **options)
    assert recorded.replays > 2 * recorded.captured > 2
    monkeypatch.setattr(slots, "replays", lambda model: False)
    counts = recorded.captured, recorded.replays
    same(found, generate(model, given, **options))
    assert counts == (recorded.captured, recorded.replays)
    assert {each.finished for each in found} == {True, False}


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_stream_is_replayed(recorded, options):
    model, (prompt,) = model_of(), prompts(1)
    options = {"max_new_tokens": 12, "eos_id": None, **options}
    drawn = list(stream(model, prompt, **options))
    assert recorded.replays == 10  # one drawn after the prompt, one by a step that compiles
    assert drawn == generate(model, [prompt], **options)[0].tokens


def test_what_cannot_be_captured_runs_as_it_is(recorded, monkeypatch, caplog):
    def looks(self, hidden, before=Transformer.logits):
        assert hidden.isfinite().all()
        return before(self, hidden)

    monkeypatch.setattr(Transformer, "logits", looks)
    model, options = model_of(), {"max_new_tokens": 12, "eos_id": EOS}
    found = generate(model, prompts(5), **options)
    assert recorded.replays == 0 < recorded.captured
    assert "without CUDA graphs, slower: aten.is_nonzero" in caplog.text
    monkeypatch.setattr(slots, "replays", lambda model: False)
    same(found, generate(model, prompts(5), **options))


def test_the_order_of_calls(monkeypatch):
    """On stand-ins of CUDA's streams and graphs: a kind of work runs once, aside, is captured at
    its second time, and replayed from then on."""
    done: list[str] = []
    free = [1 << 40, 1 << 20]

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            done.append("wait")

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            done.append("begin")

        def capture_end(self):
            done.append("end")

        def replay(self):
            done.append("replay")

    def fails():
        if "begin" in done:
            raise RuntimeError("operation not permitted when stream is capturing")
        done.append("work")

    for name, stand_in in {
        "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream,
        "graph_pool_handle": lambda: (0, 0), "stream": lambda stream: nullcontext(),
        "mem_get_info": lambda device: (free.pop(), 0), "empty_cache": lambda: done.append("empty"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "_stream", Stream)
    runner = graphs.Graphs(model_of())
    for _ in range(3):
        runner.run(1, lambda: done.append("work"))
    runner.run(2, lambda: done.append("other"))
    assert done[:3] == ["wait", "work", "wait"]
    assert done[3:9] == ["empty", "begin", "work", "end", "replay", "replay"]
    assert done[9:] == ["wait", "other", "wait"]
    done.clear()
    runner.run(3, fails)
    with pytest.raises(RuntimeError, match="not permitted"):
        runner.run(3, fails)  # captured without a loss, run as it is, which is as impossible here
    assert done == ["wait", "work", "wait", "begin", "end"]


def test_what_a_graph_would_leave_out_keeps_it_from_being_one(monkeypatch):
    model = model_of()
    assert not graphs.replays(model)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    assert not graphs.replays(model)  # the reference waits for lengths
    monkeypatch.setattr(ops.backend, "choose", lambda *tensors: "triton")
    assert graphs.replays(model)
    assert not graphs.replays(Transformer(ModelConfig(600, 1, 2, 1, 96, vocab_size=211)))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not graphs.replays(model)
    monkeypatch.setenv("PUNA_DEBUG", "1")
    assert not graphs.replays(model)
    monkeypatch.delenv("PUNA_DEBUG")
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not graphs.replays(model)
    handle.remove()
    assert graphs.replays(model)
    model.logits = lambda hidden: hidden
    assert not graphs.replays(model)
    del model.logits
    model.model.layers[0].self_attn.q_proj = nn.Sequential(model.model.layers[0].self_attn.q_proj)
    assert not graphs.replays(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_replayed_on_a_gpu(monkeypatch, dtype, options):
    """To the bit: how far a graph looks back adds nothing to a sum."""
    model, given, replayed_kinds = model_of("cuda", dtype), prompts(40), []
    given[4] = prompts(1, 2)[0] * 250
    options = {"max_new_tokens": 70, "eos_id": EOS, "batch_size": 8, **options}

    def captured(*arguments, before=graphs.captured):
        replay = before(*arguments)
        replayed_kinds.append(replay)
        return replay

    monkeypatch.setattr(graphs, "captured", captured)
    found = generate(model, given, **options)
    assert len(replayed_kinds) > 2
    monkeypatch.setattr(slots, "replays", lambda model: False)
    assert found == generate(model, given, **options)
