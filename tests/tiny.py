"""Files of every kind and models that train in a second, for the tests and the campaigns."""

import json
import random
from pathlib import Path

from puna.core.checkpoint.folder import save_model
from puna.core.config import ModelConfig
from puna.core.model import Transformer
from puna.core.text.tokenizer import train_tokenizer
from puna.trainers import sft

WORDS = (
    "red blue green cup tree lamp moon fish sing give nine why how where big old new cat".split()
)


def make_tiny(root: Path, n_kv_heads: int = 1, dim: int = 24) -> Path:
    """Fill the folder with a tokenizer, files of every kind, and models: `lm` and the reward
    models `helpfulness` and `safety` are random, `chat` answers and stops. With `n_kv_heads` = 2
    two ranks can work on the same rows; the two heads are of `dim` / 2."""
    draw = random.Random(0)

    def words(most=5):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    def messages(turns, answered):
        roles = ["user", "assistant"] * turns
        ending = [] if answered else [{"role": "user", "content": words()}]
        return [{"role": role, "content": words(3)} for role in roles] + ending

    def write(name, rows):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("text.jsonl", [{"text": words(30)} for _ in range(120)])
    write("dialogues.jsonl", [{"messages": messages(1 + i % 3, True)} for i in range(48)])
    ratings = ["significantly_better", "better", "slightly_better", "negligibly_better"]
    labels = ["chosen_safe", "both_safe", "both_unsafe"]
    write(
        "preferences.jsonl",
        [
            {"messages": messages(i % 2, False), "chosen": f"{words()} red", "rejected": words(),
             "rating": ratings[i % 4], "safety": labels[i % 3]}
            for i in range(48)
        ],
    )  # fmt: skip
    prompts = [{"messages": messages(0, False), "safety": i % 3 == 0} for i in range(16)]
    write("prompts.jsonl", prompts)
    ghosts = [{"turns": [words(2) for _ in range(2 + i % 3)], "instruction": f"always {words(2)}",
               "short": f"be {words(1)}"} for i in range(8)]  # fmt: skip
    write("ghosts.jsonl", ghosts)
    texts = [words(9) for _ in range(300)] + ["[INST] <<SYS>> always be <</SYS>> [/INST]"] * 30
    tokenizer = train_tokenizer(texts, root / "tokenizer.model", vocab_size=330)
    shape = ModelConfig(dim, 2, 2, n_kv_heads, 36, vocab_size=tokenizer.vocab_size, context=256)
    for seed, name in enumerate(("lm", "helpfulness", "safety")):
        model = Transformer(shape, "lm" if name == "lm" else "score")
        model.init_weights(seed)
        save_model(root / name, model, root / "tokenizer.model")
    trained = sft.run(
        sft.SFTConfig(
            model=root / "lm", data=[root / "dialogues.jsonl"], out=root / "chat-run",
            epochs=30, batch=4, lr=1e-2, eval_share=0.0, device="cpu", save_every=10_000,
        )
    )  # fmt: skip
    trained.rename(root / "chat")
    return root
