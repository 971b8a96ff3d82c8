"""Run: python -m pytest tests/test_attended.py -q"""

from pathlib import Path

import pytest
import torch
from llama_peer import in_transformers

from puna.core import attended
from puna.core.attended import attention_to
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer
from puna.demo import measure
from puna.demo.village import world

GQA = ModelConfig(32, 3, 4, 2, 48, vocab_size=64, context=96)


def make() -> tuple[Transformer, list[int]]:
    model = Transformer(GQA)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():  # sharp attention: the default start is nearly uniform
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model.eval(), torch.randint(64, (70,), generator=generator).tolist()


@pytest.mark.parametrize("rows", [7, 256])
def test_the_largest_weights_are_those_of_transformers(rows, monkeypatch):
    monkeypatch.setattr(attended, "ROWS", rows)
    model, ids = make()
    with torch.no_grad():
        layers = in_transformers(model)(torch.tensor([ids]), output_attentions=True).attentions
    expected = torch.stack(layers)[:, 0, :, :, 5:9].amax((0, 1, 3))
    found = attention_to(model, ids, slice(5, 9))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool((found[:5] == 0).all()) and float(found[5]) > 0
    assert torch.equal(found, attention_to(model, ids, slice(-65, -61)))


def test_a_part_that_is_not_there_is_refused():
    model, ids = make()
    with pytest.raises(ValueError, match="name a part"):
        attention_to(model, ids, slice(70, 80))
    with pytest.raises(ValueError, match="context of 96"):
        attention_to(model, ids * 2, slice(0, 4))


def test_the_instruction_is_found_among_a_dialogues_ids(tiny: Path):
    tokenizer = Tokenizer(tiny / "chat" / "tokenizer.model")
    for dialogue in world.persona_dialogues(0, 8, "value"):
        ids = measure.encode_turn(tokenizer, dialogue.questions[0], dialogue.system)
        part = measure.instruction_in(tokenizer, dialogue)
        assert dialogue.system in tokenizer.decode(ids[part])
        assert dialogue.questions[0] in tokenizer.decode(ids[part.stop :])
        assert dialogue.questions[0] not in tokenizer.decode(ids[part])
