"""What Puna writes, opened unaided by what people measure models with: lm-evaluation-harness,
RewardBench and llama.cpp, each where it is installed. Their numbers are Puna's.

Run: python -m pytest tests/test_opened_by_others.py -q
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from puna.core.checkpoint.convert import convert
from puna.core.checkpoint.folder import load_model, save_model, tokenizer_path
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.beside import CHAT_TEMPLATE
from puna.core.text.tokenizer import Tokenizer

QUESTIONS = ["red blue green", "why how where", "old new cat", "give nine", "moon fish sing"]
CHOICES = [" cup tree", " lamp", " big old new"]


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def run(program: str, folder: Path, *arguments: object) -> str:
    """The program's output, run by itself in a folder, without the network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder, env={**os.environ, **offline}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- lm-evaluation-harness ----------------------------------------------------------------------

HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

task = {
    "task": "local", "dataset_path": "json", "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": sys.argv[2]}},
    "output_type": "multiple_choice", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": sys.argv[1], "dtype": "float32"}, tasks=[task],
    device="cpu", batch_size=2, log_samples=True, bootstrap_iters=0,
    task_manager=TaskManager(include_defaults=False),
)
samples = {each["doc"]["question"]: [r[0][0] for r in each["resps"]]
           for each in found["samples"]["local"]}
print("\\n" + json.dumps([found["results"]["local"]["acc,none"], samples]))
"""


def test_lm_evaluation_harness_measures_what_puna_does(tiny: Path, tmp_path: Path) -> None:
    """The log-probability of each choice after each question, and the accuracy."""
    for package in ("lm_eval", "transformers", "datasets"):
        needs(package)
    rows = [{"question": q, "choices": CHOICES, "answer": i % 3} for i, q in enumerate(QUESTIONS)]
    file = lines(tmp_path / "task.jsonl", rows)
    said = json.loads(run(HARNESS, tmp_path, tiny / "chat", file).splitlines()[-1])
    llama = puna.load(tiny / "chat", device="cpu")
    assert llama.tokenizer is not None
    right = 0
    for row in rows:
        asked = len(llama.tokenizer.encode_start(row["question"]))
        ours = [sum(llama.logprobs(row["question"] + each)[asked - 1 :]) for each in CHOICES]
        assert said[1][row["question"]] == pytest.approx(ours, abs=1e-3)
        right += max(range(3), key=ours.__getitem__) == row["answer"]
    assert said[0] == pytest.approx(right / len(rows))


# -- RewardBench --------------------------------------------------------------------------------

# Its pipeline sends everything to "cuda"; on a machine without one it stays where it is.
REWARD_BENCH = """
import sys
import torch, transformers
if not torch.cuda.is_available():
    transformers.BatchEncoding.to = lambda self, *_, **__: self
from rewardbench.rewardbench import Args, rewardbench
rewardbench(Args(model=sys.argv[1], dataset=sys.argv[2], load_json=True, torch_dtype="float32",
                 not_quantized=True, batch_size=2, output_dir="results/"))
"""


def test_reward_bench_scores_as_puna_does(tiny: Path, tmp_path: Path) -> None:
    needs("rewardbench")
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]

    def answered(i: int, choice: int) -> list[dict[str, str]]:
        return [*asked[i], {"role": "assistant", "content": CHOICES[choice % 3].strip()}]

    rows = [{"chosen": answered(i, i), "rejected": answered(i, i + 1)} for i in range(len(asked))]
    (tmp_path / "judge").symlink_to(tiny / "helpfulness")
    run(REWARD_BENCH, tmp_path, "judge", lines(tmp_path / "pairs.jsonl", rows))
    written = (tmp_path / "results" / "judge_outputs.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in written]
    judge = puna.load(tiny / "helpfulness", device="cpu")
    for side in ("chosen", "rejected"):
        ours = judge.score([row[side] for row in rows])
        assert [row[f"scores_{side}"] for row in said] == pytest.approx(ours, abs=1e-4)
    summary = json.loads((tmp_path / "results" / "judge.json").read_text())
    wins = sum(row["scores_chosen"] > row["scores_rejected"] for row in said)
    assert summary["accuracy"] == pytest.approx(wins / len(rows))


# -- llama.cpp ----------------------------------------------------------------------------------


BEYOND = ["", " two  spaces", "line\nline\t", "Straße 中文 🙂", "<s> and </s> as text", "▁"]


def opened_by_llama_cpp(file: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(file), logits_all=True, verbose=False, n_ctx=128, n_threads=1)


def their_logits(theirs: Any, ids: list[int]) -> Any:
    theirs.reset()
    theirs.eval(ids)
    return theirs.scores[: len(ids)]


def test_llama_cpp_opens_a_gguf_of_ours(tiny: Path, tmp_path: Path) -> None:
    """Its tokens of a text, its log-probabilities of them and its chat format are Puna's."""
    needs("gguf")
    needs("llama_cpp")
    theirs = opened_by_llama_cpp(convert(tiny / "chat", tmp_path / "chat.gguf"))
    ours = puna.load(tiny / "chat", device="cpu")
    assert ours.tokenizer is not None
    for text in QUESTIONS + BEYOND:
        ids = theirs.tokenize(text.encode(), add_bos=True, special=False)
        assert ids == ours.tokenizer.encode_start(text), text
    for text in QUESTIONS:
        ids = ours.tokenizer.encode_start(text)
        logprobs = theirs.logits_to_logprobs(their_logits(theirs, ids))
        found = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        assert found == pytest.approx(ours.logprobs(text), abs=2e-3)
    assert theirs.metadata["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_cpp_computes_every_head_and_dtype(
    tiny: Path, tmp_path: Path, kv_heads: int, dtype: torch.dtype
) -> None:
    """Logits of 40 tokens, of what the file holds: of weights rounded to its dtype."""
    needs("gguf")
    needs("llama_cpp")
    tokenizer = tokenizer_path(tiny / "chat")
    size = Tokenizer(tokenizer).vocab_size
    model = Transformer(ModelConfig(64, 2, 4, kv_heads, 96, size, context=128))
    model.init_weights(1)
    save_model(tmp_path / "model", model, tokenizer)
    file = convert(tmp_path / "model", tmp_path / "model.gguf", dtype=dtype)
    ids = torch.randint(3, size, (1, 40), generator=torch.Generator().manual_seed(5))
    ours = load_model(file)
    with torch.no_grad():
        expected = ours.logits(ours(ids))[0]
    found = torch.from_numpy(their_logits(opened_by_llama_cpp(file), ids[0].tolist()).copy())
    error = float((found - expected).norm() / expected.norm())
    # llama.cpp keeps its cache in fp16 and rounds what meets an fp16 or bf16 matrix to its dtype
    assert error < {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
