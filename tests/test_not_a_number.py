"""NaN is never a number: what cannot be drawn from is an error that names the model, on every path.

Run: python -m pytest tests/test_not_a_number.py -q
"""

import math

import pytest
import torch

import puna
from puna.core import ops
from puna.core.config import ModelConfig
from puna.core.generation.generate import generate, stream
from puna.core.model import Transformer
from puna.core.native.loader import extension
from puna.core.ops import use_backend

SHAPE = ModelConfig(32, 2, 4, 2, 48, vocab_size=61, context=40)
DRAWS = [{"temperature": 0.0}, {}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.5}]
PATHS = ["reference", "native", "native, bf16", "native, int8"]


@pytest.fixture(params=PATHS)
def options(request):
    """A path through the generation, and the options that take it."""
    backend, _, weights = request.param.partition(", ")
    if backend == "native" and extension() is None:
        pytest.skip("the native engine is not built")
    with use_backend(backend):
        yield {"max_new_tokens": 6, "eos_id": None, "weight_format": weights or "fp32"}


def broken(where, value):
    """A model one of whose weights is `value`."""
    model = Transformer(SHAPE)
    model.init_weights(0)
    with torch.no_grad():
        dict(model.named_parameters())[where].view(-1)[70] = value
    return model


PLACES = ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"]
NUMBERS = [math.nan, math.inf, -math.inf]
REFUSED = "the model cannot be sampled from: its logits hold NaN or inf"


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize(
    ("where", "value"),  # inf in the head may be -inf in the logits: a token that is forbidden
    [(PLACES[0], math.nan), *((where, value) for where in PLACES[1:] for value in NUMBERS)],
)
def test_logits_that_are_no_numbers_are_an_error(options, where, value, draw):
    model = broken(where, value)
    prompts = [[1, 2, 5], [1, 2]] * 3  # row 2 of the embedding is the broken one
    with pytest.raises(ValueError, match=REFUSED):
        generate(model, prompts, **options, **draw)
    with pytest.raises(ValueError, match=REFUSED):
        list(stream(model, prompts[0], **options, **draw))


@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_nan_in_the_midst_of_an_answer_is_an_error(options, draw):
    """Of one row out of many, some steps after the prompt."""
    model = broken("model.embed_tokens.weight", 0.1)
    prompts = [[1, 5, place] for place in range(3, 9)]
    drawn = generate(model, prompts, **options, **draw)
    seen = {token for done in drawn for token in done.tokens[:-1]} - {t for p in prompts for t in p}
    with torch.no_grad():
        model.model.embed_tokens.weight[seen.pop()] = math.nan
    with pytest.raises(ValueError, match=REFUSED):
        generate(model, prompts, **options, **draw)


def test_a_draw_that_nobody_looked_at_is_looked_at(monkeypatch):
    """On a GPU `sample` does not wait to see NaN; what it drew comes to the CPU afterwards."""
    draw = ops.sample

    def unseen(logits, **options):
        tokens, logprobs = draw(logits, **options)
        return tokens, torch.full_like(logprobs, math.nan)

    monkeypatch.setattr(ops, "sample", unseen)
    with use_backend("reference"), pytest.raises(ValueError, match=REFUSED):
        generate(broken(PLACES[0], 0.1), [[1]], max_new_tokens=3, eos_id=None)


def test_a_loaded_model_is_named(tiny, tmp_path):
    llama = puna.load(tiny / "chat")
    with torch.no_grad():
        llama.model.lm_head.weight[:] = math.nan
    llama.save(tmp_path / "ruined")
    ruined = puna.load(tmp_path / "ruined")
    with pytest.raises(ValueError, match="ruined cannot be sampled from: its logits hold NaN"):
        ruined.generate("red")
    with pytest.raises(ValueError, match="ruined cannot be sampled from: its logits hold NaN"):
        list(ruined.stream("red"))
    with pytest.raises(ValueError, match="ruined gives log-probabilities that are no numbers"):
        ruined.logprobs("red cup")
    judge = puna.load(tiny / "helpfulness")
    with torch.no_grad():
        judge.model.score.weight[0, 3] = math.inf
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cup"}]
    with pytest.raises(ValueError, match="helpfulness gives scores that are no numbers"):
        judge.score(chat)


SETTINGS = [
    ("temperature", [-1, 1e-40, 1e40, math.inf, math.nan, "1", None, True]),
    ("top_p", [0, 1.5, -0.1, math.nan, math.inf, "1", None]),
    ("top_k", [-1, 2.5, math.nan, "3", None]),
    ("seed", [2**63, -(2**63) - 1, 2**64, 1.5, "x", None]),
    ("round_index", [2**63, 0.5, None]),
    ("max_new_tokens", [-1, 1.5, math.nan, "9", None, True]),
    ("batch_size", [0, 1.5, None]),
    ("eos_id", [2**63, 2.0, "2"]),
]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in SETTINGS for v in values])
def test_settings_are_refused_alike_on_every_path(name, value):
    model, said = broken(PLACES[0], 0.1), set()
    good = {"max_new_tokens": 3, "eos_id": None}
    for backend in ("reference", "native"):
        with use_backend(backend):
            for call in (generate, stream):
                if call is stream and name == "batch_size":
                    continue
                prompts = [1] if call is stream else [[1]]
                with pytest.raises(ValueError, match=f"^{name} is .*; it must") as raised:
                    call(model, prompts, **{**good, name: value})
                said.add(str(raised.value))
    assert len(said) == 1 and "\n" not in said.pop()


@pytest.mark.parametrize("prompt", [[1.5], [1, None], ["1"], [torch.tensor(1)]], ids=str)
def test_a_prompt_holds_ids_on_every_path(prompt):
    model = broken(PLACES[0], 0.1)
    for backend in ("reference", "native"):
        with use_backend(backend):
            with pytest.raises(ValueError, match="prompt 0 holds something else than ids: "):
                generate(model, [prompt], max_new_tokens=3, eos_id=None)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    model, good = broken(PLACES[0], 0.1), {"eos_id": None}
    plain = generate(model, [[1]], max_new_tokens=3, temperature=0.5, seed=7, **good)
    theirs = {"max_new_tokens": numpy.int64(3), "temperature": numpy.float32(0.5)}
    assert generate(model, [[1]], seed=numpy.int32(7), **theirs, **good) == plain


def test_row_numbers_fit_64_bits():
    model = broken(PLACES[0], 0.1)
    for name in ("prompt_ids", "sample_ids"):
        with pytest.raises(ValueError, match=f"{name} holds 9223372036854775808; they must fit"):
            generate(model, [[1]], max_new_tokens=3, eos_id=None, **{name: [2**63]})
