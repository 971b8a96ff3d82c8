"""docs/architecture.md's table of rooms: how many lines, and what they buy.

`python -m puna.benchmarks.rooms` counts again.
"""

import subprocess
import sys
from pathlib import Path

from puna.core.checkpoint.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: python -m puna.benchmarks.rooms -->\n", "<!-- end of rooms -->\n"
SOURCES = (".py", ".cpp", ".h", ".toml")

BUYS = {
    "puna": "a library's front door: load, generate, score, train from Python",
    "kernels": "a Llama's operations with gradients, for GPUs, in one folder to copy",
    "csrc": "training and sampling on CPUs, several times PyTorch's speed",
    "core": "the model, every checkpoint format, generation, FSDP2",
    "trainers": "pretraining, SFT, two reward models, rejection sampling, PPO, GAtt, V1..Vn",
    "demo": "all of the paper on a laptop in minutes, with a report",
    "annotate": "people's comparisons in a browser, with a dashboard",
    "cli": "the `puna` command",
    "recipes": "the paper's values at every size",
    "benchmarks": "figures beside the peers', each checked before it is timed",
    "tests": "what keeps all of it so",
}


def lines(room: str) -> int:
    """Lines of source that git knows in a room."""
    command = ["git", "ls-files", "--", room]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.splitlines() if name.endswith(SOURCES)]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def table() -> str:
    rows = [f"| `{room}/` | {lines(room):,} | {buys} |\n" for room, buys in BUYS.items()]
    return "| room | lines | buys |\n|---|---:|---|\n" + "".join(rows)


def page(text: str, rooms: str) -> str:
    """The page's text with `rooms` between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + rooms + END + rest.split(END)[1]


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), table()))
    sys.exit()
