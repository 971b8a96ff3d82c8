"""Answers that a vLLM server draws: with the policy's weights, scored by the trainer. The server is
`fake_vllm`, which refuses what the real one would."""

import json
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from campaign.kills import finish, starter
from fake_vllm import FakeVLLM, served

from puna.core.checkpoint.folder import load_model
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import distill, gatt, ppo, rejection, rlhf, sample
from puna.trainers.data.prompts import load_prompts
from puna.trainers.evaluation import chat
from puna.trainers.evaluation.config import EvaluateChatConfig
from puna.trainers.rl import rollout as rollouts
from puna.trainers.rl.comparisons import Variant, sample_pairs
from puna.trainers.rl.config import engine_of
from puna.trainers.rl.engine import TOKEN, Engine
from puna.trainers.rl.rollout import answer_logprobs, collect, draw_answers

CONTEXT = 200


@pytest.fixture
def fake(tiny):
    return FakeVLLM(tiny / "lm", CONTEXT)  # begins with other weights than the policy's


@pytest.fixture
def url(fake):
    with served(fake) as url:
        yield url


def rollout(tiny: Path, folder: Path, url: str, policy: Transformer | None = None, most: int = 12):
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    policy = policy or load_model(tiny / "chat")
    engine = Engine(url, folder, tokenizer, timeout=10)
    prompts = [[1, 5, 9], [1, 7, 40, 41], [1, 12]] * 3
    return collect(
        policy, prompts, prompt_ids=range(9), sample_ids=[0] * 9, max_new_tokens=most,
        eos_id=tokenizer.eos_id, temperature=0.7, seed=3, round_index=1, batch_size=4,
        engine=engine, max_tokens=256,
    )  # fmt: skip


def test_answers_are_of_the_policys_weights_and_scored_by_the_trainer(fake, url, tiny, tmp_path):
    policy = load_model(tiny / "chat")
    found = rollout(tiny, tmp_path / "engine", url, policy)
    for name, parameter in fake.model.named_parameters():
        assert torch.equal(parameter, dict(policy.named_parameters())[name]), name
    expected, _ = answer_logprobs(policy, found, temperature=0.7, max_tokens=256)
    assert torch.equal(found.logprobs, expected) and bool((expected[found.mask] < 0).all())
    assert {tuple(body["prompt"]) for body in fake.asked} == {(1, 5, 9), (1, 7, 40, 41), (1, 12)}
    assert len({body["seed"] for body in fake.asked}) == 9
    assert {body["temperature"] for body in fake.asked} == {0.7}
    assert fake.calls[:5] == ["/v1/models", "/tokenize", "/pause", "/collective_rpc", "/resume"]
    again = rollout(tiny, tmp_path / "engine", url, policy)
    assert again.answers == found.answers


def test_a_policy_that_changed_is_given_again(fake, url, tiny, tmp_path):
    policy = load_model(tiny / "chat")
    rollout(tiny, tmp_path / "engine", url, policy)
    with torch.no_grad():
        policy.model.norm.weight.mul_(1.5)
    rollout(tiny, tmp_path / "engine", url, policy)
    assert torch.equal(fake.model.model.norm.weight, policy.model.norm.weight)
    assert len(fake.loaded) == 2


def test_the_servers_key_comes_from_the_environment(fake, url, tiny, tmp_path, monkeypatch):
    fake.token = "a-key"
    with pytest.raises(ValueError, match="/v1/models refused: 401"):
        rollout(tiny, tmp_path / "engine", url)
    monkeypatch.setenv(TOKEN, "a-key")
    assert rollout(tiny, tmp_path / "engine", url).answers
    monkeypatch.setenv(TOKEN, "a\nkey")
    with pytest.raises(ValueError, match=f"{TOKEN} holds characters") as error:
        rollout(tiny, tmp_path / "engine", url)
    assert "key" not in str(error.value).replace(TOKEN, "")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c | {"token_ids": c["token_ids"][:-1], "finish_reason": "abort"}, "cut an"),
        (lambda c: c | {"token_ids": [3], "finish_reason": "length"}, "cut an answer short: 1 of"),
        (lambda c: c | {"token_ids": [3], "finish_reason": "stop"}, "cut an answer short: 1 of"),
        (lambda c: c | {"prompt_token_ids": [1]}, "cut an answer short"),
        (lambda c: c | {"token_ids": [70_000]}, "ids beyond the policy's 330 pieces"),
        (lambda c: c | {"token_ids": []}, "ids beyond the policy's 330 pieces"),
        (lambda c: c | {"token_ids": None}, "without token_ids: it takes a vLLM"),
        (lambda c: {"index": 0, "text": "hello"}, "without token_ids: it takes a vLLM"),
    ],
)
def test_an_answer_that_is_not_whole_is_refused(change, sentence, fake, url, tiny, tmp_path):
    fake.change = change
    with pytest.raises(ValueError, match=sentence) as error:
        rollout(tiny, tmp_path / "engine", url)
    assert "\n" not in str(error.value)


def test_a_server_that_is_away_says_so(tiny, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"does not answer \(.*refused.*\): start the server"):
            rollout(tiny, tmp_path / "engine", url)


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_asked(tiny, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tokenizer = Tokenizer(tiny / "tokenizer.model")
        engine = Engine(url, tmp_path, tokenizer, timeout=0.2)
        with pytest.raises(ValueError, match=r"does not answer \(timed out\)"):
            engine.draw(
                load_model(tiny / "chat"), [[1]], [(0,)], max_new_tokens=4, eos_id=2,
                temperature=1.0, batch_size=1,
            )  # fmt: skip


def test_a_server_that_sends_elsewhere_is_not_followed(fake, url, tiny, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def redirect() -> None:
            link, _ = other.accept()
            link.recv(65536)
            reply = f"HTTP/1.1 307 Away\r\nLocation: {url}/v1/models\r\nContent-Length: 0\r\n\r\n"
            link.sendall(reply.encode())
            link.close()

        threading.Thread(target=redirect, daemon=True).start()
        with pytest.raises(ValueError, match="/v1/models refused: 307"):
            rollout(tiny, tmp_path / "engine", f"http://127.0.0.1:{other.getsockname()[1]}")
    assert not fake.calls


def test_another_vocabulary_context_or_shape_is_named(fake, url, tiny, tmp_path):
    with pytest.raises(ValueError, match="room for 200 tokens, and a prompt of 4 with max_new_tok"):
        rollout(tiny, tmp_path / "engine", url, most=197)
    from puna.core.text.tokenizer import train_tokenizer

    texts = ["where is the cat of the house that they said so"] * 40
    fake.tokenizer = train_tokenizer(texts, tmp_path / "other.model", vocab_size=290)
    with pytest.raises(ValueError, match="reads the same text as other ids"):
        rollout(tiny, tmp_path / "engine", url)


def test_weights_that_the_server_does_not_take_are_named(fake, url, tiny, tmp_path):
    other = Transformer(fake.model.config.__class__(**(vars(fake.model.config) | {"ffn_dim": 40})))
    other.init_weights(0)
    with pytest.raises(ValueError, match=r"did not take the weights in .*engine \(500 .*stays pau"):
        rollout(tiny, tmp_path / "engine", url, other)
    assert fake.paused  # nobody draws from half of them
    fake.developer = False
    with pytest.raises(ValueError, match="has no /pause: start it with VLLM_SERVER_DEV_MODE=1"):
        rollout(tiny, tmp_path / "engine", url)


def test_a_server_of_another_shape_is_given_nothing(fake, url, tiny, tmp_path):
    policy = load_model(tiny / "chat").requires_grad_()
    fake.root = shutil.copytree(tiny / "chat", tmp_path / "served")
    written = json.loads((fake.root / "config.json").read_text())
    for change in ({"rope_theta": 5e5}, {"intermediate_size": 40}, {"tie_word_embeddings": True}):
        (fake.root / "config.json").write_text(
            json.dumps(written | {"rope_parameters": None} | change)
        )
        with pytest.raises(ValueError, match="served, whose shape is not the policy's: start it"):
            rollout(tiny, tmp_path / "engine", url, policy)
        assert not fake.loaded
    policy.requires_grad_(False)  # as it was when the server began
    assert rollout(tiny, tmp_path / "engine", url, policy).answers
    (fake.root / "config.json").write_text("{")
    assert rollout(tiny, tmp_path / "engine", url, policy).answers


def test_weights_that_it_takes_and_does_not_use_are_noticed(fake, url, tiny, tmp_path):
    """vLLM cuts what does not fit to its own shape, and passes over names that it has not."""
    before = fake.model
    fake.takes = lambda new: before
    with pytest.raises(
        ValueError, match=r"its probabilities are not the policy's \(\d+\.\d\d nats"
    ):
        rollout(tiny, tmp_path / "engine", url)
    fake.takes = lambda new: new
    assert rollout(tiny, tmp_path / "engine", url).answers
    fake.logprobs = lambda ids: None
    with pytest.raises(ValueError, match="without prompt_logprobs: it takes a vLLM of 0.10.2"):
        rollout(tiny, tmp_path / "engine", url)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8000", "ftp://a", "http://", "http://me:word@host", "http://h/v1", "http://h:x",
     "http://h?x=1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_before_anything_is_loaded(address, tiny, tmp_path):
    with pytest.raises(ValueError, match="give a vLLM server's address"):
        sample.SampleConfig(
            policy=tiny / "chat", prompts=[tiny / "prompts.jsonl"], out=tmp_path, engine=address
        )
    with pytest.raises(ValueError, match="give a vLLM server's address"):
        ppo.PPOConfig(
            policy=tiny / "chat", prompts=[tiny / "prompts.jsonl"], out=tmp_path, engine=address
        )


def common(tiny: Path, out: Path, url: str) -> dict:
    return dict(
        policy=tiny / "chat", prompts=[tiny / "prompts.jsonl"], out=out, engine=url, device="cpu",
        max_new_tokens=8, timeout=60,
    )  # fmt: skip


def rows(file: Path) -> list[dict]:
    return [json.loads(row) for row in file.read_text().splitlines()]


def test_every_stage_that_draws_takes_it(fake, url, tiny, tmp_path):
    rewards = dict(helpfulness=tiny / "helpfulness", safety=tiny / "safety")
    ppo.run(
        ppo.PPOConfig(
            **common(tiny, tmp_path / "ppo", url), **rewards, iterations=3, batch=4, minibatch=2,
            lr=1e-3,
        )
    )  # fmt: skip
    assert len(fake.asked) == 12 and len(fake.loaded) == 3
    first = rows(tmp_path / "ppo" / "metrics.jsonl")[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)  # the policy's own log-probs
    rejection.run(
        rejection.RejectionConfig(
            **common(tiny, tmp_path / "rejection", url), **rewards, samples=2, chunk=8, batch=2
        )
    )
    assert len(fake.asked) == 12 + 32
    sample.run(sample.SampleConfig(**common(tiny, tmp_path / "sample", url), samples=2, chunk=8))
    assert len(rows(tmp_path / "sample" / "samples.jsonl")) == 32
    distill.run(
        distill.DistillConfig(**common(tiny, tmp_path / "distill", url), chunk=8, batch=2),
        reward=lambda answers: [float(len(answer.text)) for answer in answers],
    )
    assert len(fake.asked) == 12 + 32 + 32 + 12  # six of the prompts are about safety


def test_what_every_rank_needs_is_drawn_there_too(fake, url, tiny, tmp_path, monkeypatch):
    """Ghost Attention, dialogues that are evaluated, pairs to compare."""

    def not_here(*_, **__):
        raise AssertionError("this process draws")

    monkeypatch.setattr(rollouts, "generate_together", not_here)
    fake.context = 256
    options = dict(device="cpu", max_new_tokens=8, timeout=60, engine=url)
    gatt.run(
        gatt.GAttConfig(
            **options, model=tiny / "chat", dialogues=[tiny / "ghosts.jsonl"], samples=2, batch=2,
            out=tmp_path / "gatt",
        )
    )  # fmt: skip
    answers = rows(tmp_path / "gatt" / "samples" / "turns.jsonl")
    asked = len(fake.asked)
    assert answers and len(fake.loaded) == 4 and asked == 2 * sum(2 + i % 3 for i in range(8))
    chat.run(
        EvaluateChatConfig(
            **options, model=[tiny / "chat"], dialogues=[tiny / "ghosts.jsonl"],
            out=tmp_path / "evaluation",
        ),
        keeps=lambda answers: [True] * len(answers),
    )  # fmt: skip
    assert len(fake.asked) - asked == asked // 2 and len(fake.loaded) == 8
    loop = rlhf.RLHFConfig(model=tiny / "chat", prompts=[], out=tmp_path / "rlhf", engine=url)
    assert rlhf.stage_options(loop, {}, {})["engine"] == url
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    prompts, _ = load_prompts([tiny / "prompts.jsonl"], tokenizer, 100)
    variants = tuple(Variant(tiny / name, (0.8, 1.2)) for name in ("chat", "lm"))
    sample_pairs(
        tmp_path / "pairs.jsonl", variants, tokenizer, prompts, 12, max_new_tokens=8, seed=0,
        round_index=1, device=torch.device("cpu"), engine=engine_of(loop, tokenizer),
    )  # fmt: skip
    assert len(fake.loaded) == 12
    last = dict(load_model(tiny / "lm").named_parameters())
    for name, parameter in fake.model.named_parameters():  # not those of the model before it
        assert torch.equal(parameter, last[name]), name


def test_an_answer_ends_where_the_policys_context_does(fake, url, tiny, tmp_path):
    policy = load_model(tiny / "chat")
    fake.context = policy.config.context
    room = [3, 100]
    prompts = [[1] + [7] * (fake.context - 1 - each) for each in room]
    engine = Engine(url, tmp_path, Tokenizer(tiny / "tokenizer.model"), timeout=10)
    found = draw_answers(
        policy, prompts, prompt_ids=[0, 1], sample_ids=[0, 0], max_new_tokens=12, eos_id=2,
        temperature=1.0, seed=0, round_index=0, engine=engine,
    )  # fmt: skip
    assert sorted(body["max_tokens"] for body in fake.asked) == [3, 12]
    assert all(each.finished or len(each.tokens) in (3, 12) for each in found)


def test_two_ranks_share_one_server(fake, url, tiny, tmp_path):
    argv = [
        "sample", "--policy", str(tiny / "chat"), "--prompts", str(tiny / "prompts.jsonl"),
        "--out", str(tmp_path / "run"), "--engine", url, "--device", "cpu", "--samples", "2",
        "--max-new-tokens", "8", "--chunk", "8", "--timeout", "60",
    ]  # fmt: skip
    code = f"import sys; from puna.cli.main import main; sys.exit(main({argv!r}))"
    finish(starter()(code, 2))
    found = rows(tmp_path / "run" / "samples.jsonl")
    assert [(row["prompt"], row["sample"]) for row in found] == [
        (prompt, k) for prompt in range(16) for k in range(2)
    ]
    assert len(fake.loaded) == 2 and len(fake.asked) == 32  # a chunk: weights once
