"""State belongs to the call: what runs beside it, on the same model, changes nothing.

Run: python -m pytest tests/test_threads.py -q
"""

import threading

import pytest
import torch
from campaign.threads import build, run
from engine_peers import session_of

from puna.core.generation.generate import generate, stream
from puna.core.native.engine import engine_for
from puna.core.native.loader import extension
from puna.core.ops import use_backend

native_only = pytest.mark.skipif(extension() is None, reason="the native engine is not built")
OPTIONS = {"max_new_tokens": 16, "eos_id": None, "temperature": 0.9}


@pytest.fixture(params=["reference", "native"])
def model(request):
    if request.param == "native" and extension() is None:
        pytest.skip("the native engine is not built")
    with use_backend(request.param):
        yield build(0)


def alone(model, text, **options):
    return generate(model, [text], **{**OPTIONS, **options})[0].tokens


def test_interleaved_streams_are_those_of_each_alone(model):
    texts = [[1, 5, 6], [1, 7], [1, *range(3, 30)]]
    together = list(zip(*(stream(model, text, **OPTIONS) for text in texts), strict=True))
    assert [list(each) for each in zip(*together, strict=True)] == [alone(model, t) for t in texts]


def test_generating_inside_a_stream_changes_neither(model):
    found = []
    for number, token in enumerate(stream(model, [1, 5, 6], **OPTIONS)):
        found.append(token)
        if number % 4 == 0:  # more rows, and a longer cache
            inner = generate(model, [[1, 9, 9, 4]] * 3, **{**OPTIONS, "max_new_tokens": 30})
            assert inner[0].tokens == alone(model, [1, 9, 9, 4], max_new_tokens=30)
    assert found == alone(model, [1, 5, 6])


def test_a_stream_that_is_left_gives_its_place_back(model):
    expected = alone(model, [1, 5, 6])
    for _ in range(3):
        left = stream(model, [1, 8], **OPTIONS)
        next(left)
        assert alone(model, [1, 5, 6]) == expected
        left.close()
        assert alone(model, [1, 5, 6]) == expected


@native_only
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_stream_keeps_the_weights_it_began_with(weights):
    """The embedding too, which is not packed."""
    model = build(0)
    expected = alone(model, [1, 5, 6], weight_format=weights)
    drawn = stream(model, [1, 5, 6], weight_format=weights, **OPTIONS)
    found = [next(drawn), next(drawn)]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-0.3)
    changed = alone(model, [1, 5, 6], weight_format=weights)
    assert [*found, *drawn] == expected != changed


@native_only
def test_threads_pack_the_weights_once():
    model, begin, found = build(0), threading.Barrier(6), []

    def look():
        begin.wait()
        found.append(engine_for(model))

    in_threads([look] * 6)
    assert len({id(engine) for engine in found}) == 1 and len(found) == 6


@native_only
def test_a_session_serves_one_thread_at_a_time():
    """Two in one cache would write to each other's memory: one of them is told."""
    session = session_of(build(0), 1, 48)
    empty = torch.empty(0, dtype=torch.int64)
    fed = torch.arange(48) % 60, torch.zeros(48, dtype=torch.int64), torch.arange(48), empty
    begin, told = threading.Barrier(2), []

    def feed():
        begin.wait()
        for _ in range(2000):
            try:
                session.logits(*fed)
            except RuntimeError as error:
                told.append(str(error))
                return

    in_threads([feed, feed])
    assert told and all("another thread is in this session" in each for each in told)


def in_threads(works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("openmp", [1, 2])
def test_mixed_calls_in_threads_are_those_of_each_alone(openmp):
    """A part of what campaign/threads.py does 1,000 times, under sanitizers."""
    before = torch.get_num_threads()
    torch.set_num_threads(openmp)
    try:
        assert run(threads=6, calls=48 if openmp == 1 else 16) == []
    finally:
        torch.set_num_threads(before)
