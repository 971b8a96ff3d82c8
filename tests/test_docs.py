"""What the pages for contributors name is there. Run: python -m pytest tests/test_docs.py -q"""

import importlib
import re
from pathlib import Path

import pytest

from puna.benchmarks import rooms
from puna.trainers.train.recipes import known_recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["docs/architecture.md", "docs/glossary.md", "docs/paper.md", "docs/scale.md"]
PAGES += ["docs/safety.md", "docs/benchmarks.md", "CONTRIBUTING.md", "CHANGELOG.md", "README.md"]
DOTTED = re.compile(r"`((?:kernels|core|trainers|demo|cli|benchmarks)(?:\.\w+)+)`")
FILES = re.compile(r"`((?:[\w.]+/)+[\w.]*)`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def found(name: str) -> bool:
    """Whether `puna.<name>` is a module, or something in one."""
    parts = ["puna", *name.split(".")]
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            if not hasattr(thing, attribute):
                return False
            thing = getattr(thing, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_every_name_with_dots_is_there(page):
    missing = [name for name in DOTTED.findall(text_of(page)) if not found(name)]
    assert not missing, missing


def test_the_walks_name_enough_to_follow():
    assert len(set(DOTTED.findall(text_of("docs/architecture.md")))) >= 30


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/paper.md", "CONTRIBUTING.md"])
def test_every_file_is_there(page):
    """Also in the room that the sentence is about: `decode/` in a line on csrc."""
    places = [ROOT, *(path for path in ROOT.iterdir() if path.is_dir())]
    recipes = {str(name) for name in known_recipes()}
    missing = [
        name
        for name in FILES.findall(text_of(page))
        if not any((place / name).exists() for place in places) and name not in recipes
    ]
    assert not missing, missing


def test_the_readers_route_is_one_sitting():
    route = text_of("docs/architecture.md").split("<!-- route -->")[1].split("<!-- end of route")[0]
    files = FILES.findall(route)
    total = sum(len(text_of(file).splitlines()) for file in files)
    assert files[0] == "core/model.py" and files[-1] == "trainers/ppo.py" and total <= 1500, total


def test_the_table_of_rooms_is_about_what_is_there():
    """Counted again when it is a tenth off: not with every commit."""
    written = dict(
        re.findall(r"^\| `(\w+)/` \| ([\d,]+) \|", text_of("docs/architecture.md"), re.M)
    )
    assert set(written) == set(rooms.BUYS)
    for room, count in written.items():
        assert rooms.lines(room) == pytest.approx(int(count.replace(",", "")), rel=0.1, abs=60), (
            f"{room}: run python -m puna.benchmarks.rooms"
        )
