"""Every stage on a model that brings a tokenizer.json and a chat template of its own."""

import json
from pathlib import Path

import pytest
from byte_level import CHATML, byte_level, with_model
from tiny import make_tiny

import puna
from puna.cli import chat
from puna.core.checkpoint.folder import tokenizer_path
from puna.core.text.chat import encode_dialogue
from puna.core.text.tokenizer import Tokenizer

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
COMMON = {"device": "cpu", "save_every": 10_000}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every kind, and `own`: a random model with its own tokenizer and template, taught."""
    root = make_tiny(tmp_path_factory.mktemp("tiny"))
    base = with_model(byte_level(root / "base"), 283)
    settings = puna.SFTConfig(
        model=base, data=[root / "dialogues.jsonl"], out=root / "own", epochs=12, batch=4,
        lr=1e-2, eval_share=0.0, **COMMON,
    )  # fmt: skip
    puna.sft(settings)
    return root


def test_it_learns_to_answer_and_to_stop_in_its_own_format(root: Path) -> None:
    rows = [json.loads(line) for line in (root / "dialogues.jsonl").read_text().splitlines()]
    before, after = (puna.load(root / name, device="cpu") for name in ("base", "own/model"))
    assert after.tokenizer is not None and after.tokenizer.chat_template == CHATML
    said = rows[0]["messages"]
    assert sum(after.logprobs(said)) > sum(before.logprobs(said)) + 20
    prompts = [row["messages"][:1] for row in rows[:8]]
    answers = after.generate(prompts, max_new_tokens=40, temperature=0.7)
    assert all(answers) and not any("<|im" in answer or "[INST]" in answer for answer in answers)
    assert max(map(len, answers)) < 60  # ended by itself


def test_the_loss_is_on_the_answers_alone(root: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path(root / "own/model"))
    dialogue = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue cup"}]
    ids, weights = encode_dialogue(tokenizer, dialogue)
    learned = [token for token, weight in zip(ids, weights, strict=True) if weight]
    assert tokenizer.decode(learned) == "blue cup" and learned[-1] == tokenizer.eos_id


def test_rewards_rejection_ppo_and_ghost_attention(root: Path) -> None:
    for kind in ("helpfulness", "safety"):
        puna.reward(
            puna.RewardConfig(
                model=root / "own/model", data=[root / "preferences.jsonl"], out=root / f"j-{kind}",
                batch=8, lr=1e-3, eval_share=0.0, **COMMON,
            )
        )  # fmt: skip
    judged = {
        "policy": root / "own/model", "helpfulness": root / "j-helpfulness/model",
        "safety": root / "j-safety/model", "prompts": [root / "prompts.jsonl"],
        "max_new_tokens": 12, **COMMON,
    }  # fmt: skip
    puna.rejection(puna.RejectionConfig(out=root / "rs", samples=2, batch=4, lr=1e-3, **judged))
    puna.ppo(
        puna.PPOConfig(out=root / "ppo", iterations=1, batch=8, minibatch=4, lr=1e-4, **judged)
    )
    puna.gatt(
        puna.GAttConfig(
            model=root / "own/model", dialogues=[root / "ghosts.jsonl"], out=root / "gatt",
            max_new_tokens=12, samples=2, batch=4, lr=1e-3, **COMMON,
        )
    )  # fmt: skip
    for name in ("rs", "ppo", "gatt"):
        llama = puna.load(root / name / "model", device="cpu")
        assert llama.tokenizer is not None and llama.tokenizer.chat_template == CHATML
    judge = puna.load(root / "j-safety/model", device="cpu")
    dialogue = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue [INST]"}]
    assert isinstance(judge.score(dialogue), float)


def test_chat_talks_in_it(root: Path, monkeypatch, capsys) -> None:
    told = ["red [INST] cup", "blue"]

    def typed(_: str) -> str:
        if not told:
            raise EOFError  # Ctrl-D
        return told.pop(0)

    monkeypatch.setattr("builtins.input", typed)
    chat.run(chat.ChatConfig(model=root / "own/model", max_new_tokens=30, system="be kind"))
    out = capsys.readouterr().out
    assert "chat tag" not in out and "<|im" not in out
