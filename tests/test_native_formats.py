"""Run: python -m pytest tests/test_native_formats.py -q"""

import pytest
import torch
from engine_peers import SHAPES, build, exact, feed, session_of

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


def exact_in(model, tokens, weights, rounds):
    """`exact` with the matrices, and with `rounds` what they multiply, as the format holds them."""
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
    # Where fp32 and fp64 lie on two sides of a half, a number is rounded the other way.
    rounds = weights == "int8" or name == "avx512_bf16"
    near = 7e-4 if rounds else 1e-5
    for row, sequence in enumerate(sequences):
        truth = exact_in(model, sequence, weights, rounds)
        torch.testing.assert_close(found[row].double(), truth, rtol=0, atol=near)
    lost = (found[1].double() - exact(model, sequences[1])).abs().max()
    assert 2 * near < lost, "nothing was rounded"


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
