"""`import puna`: what stands there, that it costs nothing, and that paths may be text.
Run: python -m pytest tests/test_front_door.py -q"""

import ast
import importlib
import subprocess
import sys
import typing
from dataclasses import MISSING, fields
from importlib import metadata
from pathlib import Path

import pytest

import puna
from puna.cli.main import VERBS, main
from puna.trainers.train.paths import path_fields

INIT = Path(__file__).resolve().parents[1] / "puna" / "__init__.py"


def python(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_it_imports_nothing_heavy():
    heavy = ("torch", "numpy", "sentencepiece", "tyro", "puna.core", "puna.trainers")
    program = f"import sys, puna; print([name for name in {heavy} if name in sys.modules])"
    assert python(program) == "[]"
    assert python(
        "import sys, puna; dir(puna), puna.__version__; print('torch' in sys.modules)"
    ) == ("False")


@pytest.mark.parametrize(
    ("given", "taken"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_soon_sleep_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], taken: str
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert python("import os, puna; print(os.environ.get('GOMP_SPINCOUNT'))") == taken


def test_every_name_is_there_and_is_what_it_says():
    for name in puna.__all__:
        assert getattr(puna, name) is not None and name in dir(puna)
    assert set(puna.__all__) == {*puna.PLACES, "__version__"}
    assert puna.load is importlib.import_module("puna.core.llama").load
    for stage, config in puna.STAGES.items():
        module = importlib.import_module(f"puna.trainers.{stage}")
        assert getattr(puna, stage) is module.run and getattr(puna, config) is getattr(
            module, config
        )


def test_type_checkers_see_the_same_names():
    tree = ast.parse(INIT.read_text(encoding="utf-8"))
    ifs = [node for node in tree.body if isinstance(node, ast.If)]
    (block,) = (node for node in ifs if ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == puna.PLACES


def test_the_rooms_are_where_they_were():
    program = (
        "import puna, puna.kernels, puna.core, puna.trainers; from puna.trainers import sft, ppo; "
        "from puna import kernels, load; run = puna.sft; from puna.trainers import sft as again; "
        "print(kernels.__name__, puna.trainers.sft is sft is again, run is sft.run)"
    )
    assert python(program) == "puna.kernels True True"


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'puna' has no attribute 'lode'"):
        puna.lode  # noqa: B018


def test_the_version(capsys, monkeypatch):
    assert puna.__version__ == metadata.version("puna")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"puna {puna.__version__}\n"

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(puna, "version", missing)
    assert puna._version() == "0+checkout"


CONFIGS = {verb: getattr(importlib.import_module(v.module), v.config) for verb, v in VERBS.items()}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if path_fields(CONFIGS[verb])])
def test_a_configuration_takes_paths_as_text(verb):
    cls = CONFIGS[verb]
    places = path_fields(cls)
    others = {
        each.name: "x"
        for each in fields(cls)
        if each.name not in places and each.default is each.default_factory is MISSING
    }
    given = {name: ["a/b", Path("c")] if several else "a/b" for name, several in places.items()}
    config = cls(**given, **others)
    for name, several in places.items():
        value = getattr(config, name)
        assert (list(value) if several else value) == (
            [Path("a/b"), Path("c")] if several else Path("a/b")
        )
        assert all(isinstance(each, Path) for each in (value if several else [value]))
    alone = cls(**{**given, **{name: "a/b" for name in places}}, **others)
    assert all(list(getattr(alone, n)) == [Path("a/b")] for n, several in places.items() if several)


def test_no_path_is_hidden_from_the_conversion():
    """A field whose type names Path in another way than `path_fields` knows would stay text."""
    for cls in CONFIGS.values():
        named = {name for name, hint in typing.get_type_hints(cls).items() if "Path" in str(hint)}
        assert named == path_fields(cls).keys()
