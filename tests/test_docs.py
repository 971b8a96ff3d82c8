"""What the pages for contributors name is there. Run: python -m pytest tests/test_docs.py -q"""

import ast
import importlib
import re
from collections import defaultdict
from pathlib import Path

import pytest

from puna.benchmarks import rooms
from puna.cli.main import VERBS
from puna.trainers.train.claim import ASKED_EACH_TIME
from puna.trainers.train.kinds import Kind, kinds_of
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


def imports_of(path: str) -> set[str]:
    """The modules that a file of tests names in its imports."""
    found = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rows_of_the_paper() -> list[list[str]]:
    lines = text_of("docs/paper.md").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    return [row for row in rows if row[0] != "paper"]


@pytest.mark.parametrize("row", rows_of_the_paper(), ids=lambda row: f"{row[0]}, {row[1][:30]}")
def test_a_part_of_the_paper_is_held_by_tests_that_import_its_code(row):
    _, _, code, _, tests = row
    imported = {file: imports_of(file) for file in FILES.findall(tests)}
    modules = {
        "puna." + file.removesuffix(".py").rstrip("/").replace("/", ".")
        for file in FILES.findall(code)
    }

    def used(module: str, names: set[str]) -> bool:
        return any(name == module or name.startswith(f"{module}.") for name in names)

    idle = [file for file, names in imported.items() if not any(used(m, names) for m in modules)]
    bare = [module for module in modules if not any(used(module, n) for n in imported.values())]
    assert modules and imported and not idle and not bare, (idle, bare)


CALLED = {"ppo": "PPO's", "gatt": "Ghost Attention's", "rejection": "rejection sampling's"}


@pytest.mark.parametrize(
    ("begins", "kind"),
    [
        ("What decides no number may change", Kind.FREE),
        ("How a run began cannot change", Kind.FIXED),
    ],
)
def test_the_page_on_runs_names_every_option_of_a_kind(begins, kind):
    """As it stands beside the field; where stages differ about an option, the fewer are named."""
    page = text_of("docs/runs.md")
    said = page.split(f"- **{begins}**")[1].split("\n- ")[0]
    of: dict[str, set[str]] = defaultdict(set)
    otherwise: dict[str, set[str]] = defaultdict(set)
    for verb, entry in VERBS.items():
        cls = getattr(importlib.import_module(entry.module), entry.config)
        kinds = kinds_of(cls)
        if "amend" in kinds:  # a stage that can be amended
            for name in cls.__dataclass_fields__.keys() - {*ASKED_EACH_TIME}:
                right = kinds.get(name, Kind.AMENDED) is kind
                (of if right else otherwise)[name].add(verb)
    assert set(re.findall(r"`\[?(\w+)\]?`", said)) == of.keys()
    for name in of.keys() & otherwise.keys():
        for verb in min(of[name], otherwise[name], key=len):
            assert re.search(rf"{CALLED[verb]}[^.;:]*`{name}`|`{name}`[^.;:]*{CALLED[verb]}", page)
