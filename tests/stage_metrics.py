"""A short seeded run of every stage, through the command line: what a change of walls must keep.

    python tests/stage_metrics.py FOLDER FIGURES.json      # once before, once after
    python tests/stage_metrics.py --compare A.json B.json  # to the bit, but for times and new names

The figures are every row of every metrics.jsonl and a hash of every finished model's weights.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

from puna.cli.main import main as puna

WORDS = "red blue green cup tree lamp moon fish sing give nine why how where big old new".split()
RATINGS = ["significantly_better", "better", "slightly_better", "negligibly_better"]
LABELS = ["chosen_safe", "both_safe", "both_unsafe"]
RENAMED = {  # names in metrics.jsonl that changed since the first figures
    "heldout_": "eval_",
    "branch_tagged": "branch_is_safety",
}


def write_data(folder: Path) -> None:
    """Files of every kind, the same ones every time."""
    draw = random.Random(0)

    def words(most: int = 5) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    def user() -> list[dict[str, str]]:
        return [{"role": "user", "content": words()}]

    def exchange() -> list[dict[str, str]]:
        return [*user(), {"role": "assistant", "content": words(3)}]

    rows = {
        "text": [{"text": words(30)} for _ in range(200)],
        "chat": [{"messages": exchange() * (1 + i % 2)} for i in range(80)],
        "pairs": [
            {
                "messages": user(), "chosen": f"{words()} red", "rejected": words(),
                "rating": RATINGS[i % 4], "safety": LABELS[i % 3],
            }
            for i in range(60)
        ],
        "prompts": [{"messages": user(), "safety": i % 3 == 0} for i in range(24)],
        "ghosts": [
            {"turns": [words(2)] * 3, "instruction": f"always {words(2)}", "short": words(1)}
            for _ in range(8)
        ],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "rlhf.toml").write_text(RLHF)


RLHF = """
versions = 2
ppo_versions = 1
helpfulness_pairs = 24
safety_pairs = 24
max_new_tokens = 12
[reward]
batch = 8
lr = 1e-3
[safety]
safety_weight = 0.5
[rejection]
samples = 3
batch = 4
lr = 1e-3
chunk = 8
[ppo]
iterations = 2
batch = 8
minibatch = 4
lr = 1e-4
"""


def run(*arguments: object, may_wait: bool = False) -> bool:
    status = puna([str(argument) for argument in arguments])
    if status and not may_wait:
        raise SystemExit(f"puna {arguments[0]} ended with {status}")
    return status == 0


def stages(root: Path) -> None:
    data = root / "data"
    write_data(data)
    common = ["--device", "cpu"]
    run(
        "tokenizer", "train", "--data", data / "text.jsonl", "--vocab-size", 300,
        "--output", root / "tokenizer.model",
    )  # fmt: skip
    run(
        "pretrain", "--data", data / "text.jsonl", "--tokenizer", root / "tokenizer.model",
        "--context", 256, "--row-tokens", 64, "--steps", 12, "--batch", 4, "--lr", 3e-3,
        "--warmup-steps", 3, "--eval-every", 6, "--out", root / "pretrain", *common,
    )  # fmt: skip
    run(
        "sft", "--model", root / "pretrain/model", "--data", data / "chat.jsonl", "--epochs", 30,
        "--batch", 4, "--lr", 3e-3, "--out", root / "sft", *common,
    )  # fmt: skip
    for kind, extra in (("helpfulness", []), ("safety", ["--safety-weight", 0.5])):
        run(
            "reward", "--model", root / "sft/model", "--data", data / "pairs.jsonl", "--batch", 8,
            "--micro-batch", 4, "--lr", 1e-3, "--out", root / kind, *extra, *common,
        )  # fmt: skip
    judged = [
        "--policy", root / "sft/model", "--helpfulness", root / "helpfulness/model",
        "--safety", root / "safety/model", "--prompts", data / "prompts.jsonl",
        "--max-new-tokens", 12, *common,
    ]  # fmt: skip
    run(
        "rejection", *judged, "--samples", 4, "--batch", 4, "--lr", 1e-3, "--chunk", 8,
        "--out", root / "rejection",
    )  # fmt: skip
    run(
        "ppo", *judged, "--iterations", 4, "--batch", 16, "--minibatch", 8, "--lr", 1e-4,
        "--critic-warmup", 1, "--out", root / "ppo",
    )  # fmt: skip
    run(
        "ppo", *judged, "--iterations", 3, "--batch", 8, "--minibatch", 4, "--lr", 1e-4,
        "--critic", "policy", "--unfinished", "mask", "--micro-batch-tokens", 64,
        "--out", root / "ppo-mask",
    )  # fmt: skip
    run(
        "gatt", "--model", root / "sft/model", "--dialogues", data / "ghosts.jsonl",
        "--mix", data / "chat.jsonl", "--max-new-tokens", 12, "--samples", 2, "--batch", 4,
        "--lr", 1e-3, "--out", root / "gatt", *common,
    )  # fmt: skip
    run(
        "distill", "--policy", root / "sft/model", "--safety", root / "safety/model",
        "--prompts", data / "prompts.jsonl", "--mix", data / "chat.jsonl", "--max-new-tokens", 12,
        "--batch", 4, "--lr", 1e-3, "--out", root / "distill", *common,
    )  # fmt: skip
    loop(root, data, common)


def loop(root: Path, data: Path, common: list[str]) -> None:
    """`puna rlhf`, with the longer answer preferred in every comparison that it waits for."""
    arguments = [
        "rlhf", data / "rlhf.toml", "--model", root / "sft/model",
        "--prompts", data / "prompts.jsonl", "--helpfulness-prompts", data / "prompts.jsonl",
        "--safety-prompts", data / "prompts.jsonl", "--out", root / "rlhf", *common,
    ]  # fmt: skip
    while not run(*arguments, may_wait=True):
        waiting = [
            path
            for path in sorted((root / "rlhf").glob("round-*/*-pairs.jsonl"))
            if not path.with_name(path.name.replace("-pairs", "")).exists()
        ]
        if not waiting:
            raise SystemExit("puna rlhf ended for another reason than a missing annotator")
        for path in waiting:
            rows = [answered(json.loads(line)) for line in path.read_text().splitlines()]
            path.with_name(path.name.replace("-pairs", "")).write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )


def answered(pair: dict) -> dict:
    longer, other = sorted((pair["a"], pair["b"]), key=lambda text: (-len(text), text))
    level = RATINGS[min(3, max(0, 3 - (len(longer) - len(other)) // 4))]
    row = {"messages": pair["messages"], "chosen": longer, "rejected": other}
    return {**row, "rating": level, "safety": "both_safe"}


def figures(root: Path) -> dict:
    found: dict = {}
    for path in sorted(root.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.parent.relative_to(root))] = [
            {k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows
        ]
    for path in sorted(root.rglob("model/model.safetensors")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(root))] = digest
    return found


def renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def compare(before: dict, after: dict) -> list[str]:
    """What differs; a name that is only in `after` is new and no difference."""
    wrong = [f"{name}: missing" for name in before.keys() - after.keys()]
    for name, old in before.items():
        new = after.get(name)
        if isinstance(old, str):
            wrong += [f"{name}: other weights"] if new != old else []
        elif new is not None:
            pairs = list(zip(old, new, strict=False))
            wrong += [f"{name}: {len(old)} rows, {len(new)} now"] if len(old) != len(new) else []
            wrong += [
                f"{name}, step {row['step']}: {key} was {value!r}, is {other.get(renamed(key))!r}"
                for row, other in pairs
                for key, value in row.items()
                if other.get(renamed(key)) != value
            ]
    return wrong


def main(arguments: list[str]) -> int:
    if arguments[0] == "--compare":
        before, after = (json.loads(Path(path).read_text()) for path in arguments[1:])
        wrong = compare(before, after)
        rows = sum(len(rows) for rows in before.values() if isinstance(rows, list))
        print("\n".join(wrong) or f"{len(before)} runs and models, {rows} rows: equal to the bit")
        return bool(wrong)
    root, out = map(Path, arguments)
    stages(root)
    out.write_text(json.dumps(figures(root), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
