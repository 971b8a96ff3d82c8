"""vLLM itself, where it is installed: the answers are the policy's, its sentences reach the user.

Run: python -m pytest tests/test_vllm.py -q       (with `vllm` on the PATH; on a CPU, too)
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from test_engine import common, rows
from tiny import make_tiny

from puna.core.checkpoint.folder import load_model
from puna.core.generation.generate import generate
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer
from puna.trainers import gatt, ppo, rejection
from puna.trainers.rl.engine import TOKEN, Engine

VLLM = shutil.which("vllm")
pytestmark = pytest.mark.skipif(VLLM is None, reason="there is no vllm on the PATH")
STARTING = 300.0  # seconds: it compiles nothing (eager), but loads a hundred libraries
CONTEXT = 240
PROMPTS = [[1, 5, 9], [1, 7, 40, 41], [1, 12], [1, 30, 31, 32, 33]]
EOS = 2


@contextmanager
def server(folder: Path, log: Path, *flags: str, **environment: str) -> Iterator[str]:
    """A server of the model, ready; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(VLLM), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--dtype",
        "float32", "--max-model-len", str(CONTEXT), "--enforce-eager", *flags,
    ]  # fmt: skip
    of_server = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as said:
        process = subprocess.Popen(
            command, env=without | of_server | environment, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(url, process, log)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + STARTING
    while time.monotonic() < until and process.poll() is None:
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"vllm did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """With heads of 32, the smallest that vLLM has on a CPU."""
    return make_tiny(tmp_path_factory.mktemp("models"), dim=64)


@pytest.fixture(scope="module")
def url(tiny, tmp_path_factory):
    """A server that began with other weights than the policy's."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    with server(tiny / "lm", log, VLLM_SERVER_DEV_MODE="1") as url:
        yield url


@pytest.fixture
def engine(url, tiny, tmp_path):
    return Engine(url, tmp_path / "engine", Tokenizer(tiny / "tokenizer.model"), timeout=120)


def drawn(engine: Engine, policy: Transformer, prompts, keys, temperature=0.0, most=24):
    return engine.draw(
        policy, prompts, keys, max_new_tokens=most, eos_id=EOS, temperature=temperature,
        batch_size=32,
    )  # fmt: skip


def test_greedy_answers_are_the_policys_also_when_it_has_changed(engine, tiny):
    policy = load_model(tiny / "chat").requires_grad_()
    seen = []
    for step in range(3):
        found = [each.tokens for each in drawn(engine, policy, PROMPTS, [(i,) for i in range(4)])]
        ours = generate(policy, PROMPTS, max_new_tokens=24, eos_id=EOS, temperature=0.0)
        assert found == [each.tokens for each in ours], step
        seen.append(found)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    assert seen[0] != seen[1] != seen[2]


def test_draws_are_of_the_whole_distribution(engine, tiny):
    """No default of the server's cuts the tail off: 2,000 first tokens, each as often as it is
    likely."""
    policy, count = load_model(tiny / "lm"), 2_000  # random weights: no token is likely
    for temperature in (1.0, 0.7):
        found = drawn(engine, policy, [PROMPTS[0]] * count, [(i, 7) for i in range(count)],
                      temperature, most=1)  # fmt: skip
        with torch.no_grad():
            logits = (policy.head_weight @ policy(torch.tensor([PROMPTS[0]]))[0, -1]).double()
        expected = torch.softmax(logits / temperature, -1) * count
        times = Counter(each.tokens[0] for each in found)
        seen = torch.tensor([times[token] for token in range(len(expected))])
        squares = float(((seen - expected) ** 2 / expected).sum())
        freedom = len(expected) - 1
        assert abs(squares - freedom) < 5 * (2 * freedom) ** 0.5  # chi-squared
        assert len(times) > 0.9 * len(expected)
    again = drawn(engine, policy, [PROMPTS[0]] * 50, [(i, 7) for i in range(50)], 0.7, most=1)
    assert [each.tokens for each in again] == [each.tokens for each in found[:50]]


def test_stages_that_draw_there(url, tiny, tmp_path):
    rewards = dict(helpfulness=tiny / "helpfulness", safety=tiny / "safety")
    ppo.run(
        ppo.PPOConfig(
            **common(tiny, tmp_path / "ppo", url), **rewards, iterations=3, batch=8, minibatch=4,
            lr=1e-3,
        )
    )  # fmt: skip
    first, *_, last = rows(tmp_path / "ppo" / "metrics.jsonl")
    assert first["kl"] == pytest.approx(0.0, abs=1e-5) and last["kl"] != first["kl"]
    rejection.run(
        rejection.RejectionConfig(
            **common(tiny, tmp_path / "rejection", url), **rewards, samples=2, chunk=8, batch=2
        )
    )
    assert (tmp_path / "rejection" / "model" / "config.json").exists()
    gatt.run(
        gatt.GAttConfig(
            model=tiny / "chat", dialogues=[tiny / "ghosts.jsonl"], samples=2, batch=2,
            out=tmp_path / "gatt", device="cpu", max_new_tokens=8, timeout=60, engine=url,
        )
    )  # fmt: skip
    assert rows(tmp_path / "gatt" / "samples" / "turns.jsonl")


def test_weights_that_it_cuts_are_noticed(engine, tiny, monkeypatch):
    """It loads a wider model's weights into its own and says nothing."""
    other = Transformer(replace(load_model(tiny / "chat").config, ffn_dim=400))
    other.init_weights(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(8)  # as sure of its tokens as a trained one is
    monkeypatch.setattr(engine, "_check_shape", lambda *_: None)  # it is on another machine
    with pytest.raises(ValueError, match="its probabilities are not the policy's"):
        drawn(engine, other, PROMPTS, [(i,) for i in range(4)])


def test_what_it_does_not_take_is_said_and_it_goes_on(engine, tiny):
    policy = load_model(tiny / "chat")
    other = Transformer(replace(policy.config, ffn_dim=40))
    other.init_weights(0)
    with pytest.raises(ValueError, match="lm, whose shape is not the policy's: start it with"):
        drawn(engine, other, PROMPTS, [(i,) for i in range(4)])
    with pytest.raises(ValueError, match="room for 240 tokens"):
        drawn(engine, policy, PROMPTS, [(i,) for i in range(4)], most=250)
    found = [each.tokens for each in drawn(engine, policy, PROMPTS, [(i,) for i in range(4)])]
    ours = generate(policy, PROMPTS, max_new_tokens=24, eos_id=EOS, temperature=0.0)
    assert found == [each.tokens for each in ours]


def test_a_server_with_a_key_and_without_its_developer_mode(tiny, tmp_path, monkeypatch):
    policy = load_model(tiny / "chat")
    with server(tiny / "lm", tmp_path / "log", "--api-key", "a-key") as url:
        engine = Engine(url, tmp_path / "e", Tokenizer(tiny / "tokenizer.model"), timeout=60)
        with pytest.raises(ValueError, match="/v1/models refused: 401"):
            drawn(engine, policy, PROMPTS, [(i,) for i in range(4)])
        monkeypatch.setenv(TOKEN, "a-key")
        with pytest.raises(ValueError, match="has no /pause: start it with VLLM_SERVER_DEV_MODE=1"):
            drawn(engine, policy, PROMPTS, [(i,) for i in range(4)])
