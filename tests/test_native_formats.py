"""Run: python -m pytest tests/test_native_formats.py -q"""

import pytest
import torch
from engine_peers import SHAPES, build, exact, feed, session_of

from puna.core import ops
from puna.core.model import Transformer
from puna.core.native.engine import engine_for, instruction_sets
from puna.core.native.loader import extension
from puna.core.ops import use_backend

pytestmark = pytest.mark.skipif(extension() is None, reason="the native engine is not built")


def by_groups(rows):
    """int8, 32 numbers to a scale: the largest magnitude of a group is 127."""
    count, width = rows.shape
    groups = torch.nn.functional.pad(rows, (0, -width % 32)).view(count, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    whole = (groups / scale.clamp_min(1e-30)).round()
    return (whole * scale).view(count, -1)[:, :width]


def rounded_attention(q, k, v, cu_seqlens=None, scale=None):
    """Causal, (1, T, H, D), of operands in bf16: the scores' powers, too, whose sum is not."""
    q, k, v = (x[0].bfloat16().to(x.dtype).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.mT * q.shape[2] ** -0.5
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    powers = (scores - scores.masked_fill(hidden, -torch.inf).amax(-1, keepdim=True)).exp()
    powers = powers.masked_fill(hidden, 0)
    out = powers.bfloat16().to(q.dtype) @ v / powers.sum(-1, keepdim=True)
    return out.transpose(0, 1)[None]


def exact_in(model, tokens, weights, rounds, attends):
    """`exact` with the matrices, and with `rounds` what they multiply, as the format holds them;
    with `attends` attention's operands in bf16."""
    rounding = by_groups if weights == "int8" else lambda w: w.bfloat16().to(w.dtype)
    of_inputs = rounding if rounds else lambda x: x
    wide = Transformer(model.config).double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad(), use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        for module in wide.modules():
            if isinstance(module, torch.nn.Linear) or (
                weights == "int8" and isinstance(module, torch.nn.Embedding)
            ):
                module.weight.copy_(rounding(module.weight))
        if attends:
            patch.setattr(ops, "attention", rounded_attention)
        patch.setattr(torch.nn.functional, "linear", lambda x, w: (of_inputs(x[0]) @ w.T)[None])
        hidden = wide(torch.tensor([tokens]))[0, -1:]
        return wide.head_weight @ of_inputs(hidden)[0]


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["avx512_bf16", "avx512", "avx2", "base"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_formats_against_fp64_of_rounded_numbers(config, name, weights, threads):
    if name not in instruction_sets(config.head_dim):
        pytest.skip(f"no {name} for heads of {config.head_dim} on this machine")
    model = build(config)
    with torch.no_grad():
        model.lm_head.weight[3] = 0  # groups without a scale
    torch.manual_seed(1)
    sequences = [torch.randint(config.vocab_size, (n,)).tolist() for n in (1, 30, 2, 17, 9)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        session = session_of(model, 5, 32, name, weights)
        found = feed(session, sequences)
        alone = feed(session, sequences[1:2])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], found[1])
    # Where fp32 and fp64 lie on two sides of a half, a number is rounded the other way. Attention
    # in bf16 comes by halves, too: one of the sequences may end a rounding's difference away.
    attends = name == "avx512_bf16"
    rounds = weights == "int8" or attends
    near = 7e-4 if rounds else 1e-5
    truths = [exact_in(model, sequence, weights, rounds, attends) for sequence in sequences]
    pairs = zip(found, truths, strict=True)
    errors = sorted(float((logits - truth).abs().max()) for logits, truth in pairs)
    assert errors[-1 - attends] <= near and errors[-1] <= (0.01 if attends else near)
    lost = (found[1].double() - exact(model, sequences[1])).abs().max()
    assert 2 * near < lost, "nothing was rounded"


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_any_way_through_a_prompt_gives_the_same_bits(config, weights):
    """At once, token by token, in pieces that end anywhere, and behind a row that was copied."""
    session = session_of(build(config), 4, 40, weights=weights)
    tokens = torch.randint(config.vocab_size, (37,)).tolist()

    def pieces(row, *ends):
        for begin, end in zip((0, *ends), (*ends, 37), strict=True):
            found = session.logits(
                torch.tensor(tokens[begin:end]), torch.full((end - begin,), row),
                torch.arange(begin, end), torch.tensor([end - begin - 1]),
            )  # fmt: skip
        return found

    whole = pieces(0)
    assert torch.equal(pieces(1, *range(1, 37)), whole)
    assert torch.equal(pieces(2, 17, 18, 35), whole)
    session.copy_row(2, 3, 19)  # half of a pair of bf16
    again = session.logits(
        torch.tensor(tokens[19:]), torch.full((18,), 3), torch.arange(19, 37), torch.tensor([17])
    )
    assert torch.equal(again, whole)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_pass_for_a_number(weights, value):
    model = build(SHAPES[0])
    with torch.no_grad():
        model.lm_head.weight[5, 3] = value
    logits = feed(session_of(model, 1, 4, weights=weights), [[1, 2]])[0]
    assert not logits[5].isfinite()
    assert logits[torch.arange(97) != 5].isfinite().all()


def test_formats_are_asked_for_by_name():
    model = build(SHAPES[0])
    assert engine_for(model, "int8") is engine_for(model, "int8") is not engine_for(model)
    with pytest.raises(ValueError, match="'int4'; expected one of fp32, bf16, int8"):
        engine_for(model, "int4")
    with use_backend("reference"), pytest.raises(ValueError, match="int8 weights need the native"):
        engine_for(model, "int8")
    with pytest.raises(ValueError, match="bfloat16 on cpu, not float32"):
        engine_for(model.bfloat16(), "int8")
