"""The walls of the house: who may import whom, how long a file may be, what the README shows."""

import ast
import functools
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CEILING = 400

# Each room and the rooms below it. benchmarks and tests may look at everything.
MAY_IMPORT = {
    "kernels": set(),
    "core": {"kernels"},
    "trainers": {"core"},
    "demo": {"core", "trainers"},
    "annotate": {"core", "trainers"},
    "recipes": set(),
    "cli": {"kernels", "core", "trainers", "demo", "annotate", "recipes", "benchmarks", "puna"},
    "benchmarks": {"kernels", "core", "trainers", "demo", "recipes", "cli"},
    "puna": {"core", "trainers"},  # the front door; inside, only cli goes through it
}
ROOMS = [room for room in MAY_IMPORT if (ROOT / room).is_dir()]


@functools.cache
def tracked(*patterns: str) -> list[Path]:
    """Files that git knows or would add, so that stray build outputs are not judged."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for line in listed.splitlines() if (path := ROOT / line).is_file()]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def sources(room: str) -> list[Path]:
    return tracked(f"{room}/*.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("puna", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def resolve(path: Path, node: ast.ImportFrom) -> str:
    """The absolute name of the module that a `from ... import` in `path` names."""
    if not node.level:
        return node.module or ""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *(node.module.split(".") if node.module else [])])


def imported(path: Path, *, everywhere: bool = True) -> set[str]:
    """Absolute names of the modules that a file imports; with `everywhere=False` only those at
    module level, outside `if TYPE_CHECKING`: the ones that run when the file is imported."""
    tree = parsed(path)
    nodes = ast.walk(tree) if everywhere else run_at_import(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve(path, node)
            names.add(module)
            names.update(
                f"{module}.{alias.name}" for alias in node.names if is_module(module, alias)
            )
    return names


def is_module(package: str, alias: ast.alias) -> bool:
    parts = package.split(".")
    if parts[0] != "puna":
        return False
    place = ROOT.joinpath(*parts[1:], alias.name)
    return place.with_suffix(".py").is_file() or place.is_dir()


def run_at_import(body: list[ast.stmt]):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            yield from run_at_import(getattr(node, field, []))


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "puna" and len(parts) > 1 else None


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    allowed = MAY_IMPORT[room] | {room}
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name in imported(path)
        if (other := room_of(name)) is not None and other not in allowed
    }
    assert not wrong, f"{room} may import only {sorted(allowed)}: {sorted(wrong)}"


def test_only_the_command_line_goes_through_the_front_door():
    """`import puna`, or a name of its own from it: inside, only cli is a user of the library."""
    wrong = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for room in ROOMS
        if room != "cli"
        for path in sources(room)
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Import) and any(alias.name == "puna" for alias in node.names))
        or (
            isinstance(node, ast.ImportFrom)
            and resolve(path, node) == "puna"
            and not all(is_module("puna", alias) for alias in node.names)
        )
    }
    assert not wrong, sorted(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_imported_under_a_bare_name(room):
    bare = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in [*sources(room), *tracked("tests/*.py")]
        for name in imported(path)
        if name.split(".")[0] in {*MAY_IMPORT, "tests"} - {"puna"}
    }
    assert not bare, f"write puna.<room>: {sorted(bare)}"


def test_kernels_need_torch_and_triton_only():
    wrong = set()
    for path in sources("kernels"):
        for name in imported(path):
            top = name.split(".")[0]
            if top not in {"torch", "triton", "puna"} and top not in sys.stdlib_module_names:
                wrong.add(f"{path.name} imports {name}")
        if re.search(r"^\s*(from|import) puna\b", path.read_text(encoding="utf-8"), re.M):
            wrong.add(f"{path.name} names puna: the folder could not be copied under another name")
    assert not wrong, sorted(wrong)


def test_relative_imports_only_in_kernels():
    relative = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        if room != "kernels"
        for path in sources(room)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and node.level
    }
    assert not relative, f"write puna.<room>: {sorted(relative)}"


def test_core_and_trainers_take_operations_from_core_ops():
    """Only core/ops.py looks into kernels, so that one place decides which back end runs. (Native
    code takes from there how a second derivative is refused, and nothing else.)"""
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for room in ("core", "trainers", "demo", "cli")
        for path in sources(room)
        if path not in (ROOT / "core" / "ops.py", ROOT / "core" / "native" / "autograd.py")
        for name in imported(path)
        if room_of(name) == "kernels"
    }
    native = {
        ast.unparse(node)
        for node in ast.walk(parsed(ROOT / "core" / "native" / "autograd.py"))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "kernels" in ast.unparse(node)
    }
    assert not wrong, sorted(wrong)
    assert native == {"from puna.kernels.derivatives import first_only"}


def test_no_import_cycles():
    files = {module_name(path): path for room in ROOMS for path in sources(room)}
    edges = {
        name: {
            other for other in imported(path, everywhere=False) if other in files and other != name
        }
        for name, path in files.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name]):
                # A package's __init__ holds a docstring, or in kernels the public names.
                if files[other].name != "__init__.py":
                    visit(other, (*trail, name))
            done.add(name)

    for name in sorted(files):
        visit(name, ())


MUTATORS = set(
    "add append appendleft clear discard extend insert pop popitem register remove reverse "
    "setdefault sort update setattr delattr".split()
)


def imported_names(tree: ast.Module) -> set[str]:
    """The names that imports at module level bind."""
    return {
        (alias.asname or alias.name).partition(".")[0]
        for node in run_at_import(tree.body)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


def root_of(node: ast.expr) -> str | None:
    """`a` of `a.b[c].d`; None of a plain name, which an assignment binds anew."""
    inside = node
    while isinstance(inside, (ast.Attribute, ast.Subscript, ast.Starred)):
        inside = inside.value
    return inside.id if isinstance(inside, ast.Name) and inside is not node else None


def touched_at_import(tree: ast.Module) -> list[ast.stmt]:
    """The statements that change an object which another module has made, when this one is
    imported: what that object then holds depends on who was imported before."""
    names, found = imported_names(tree), []
    for node in run_at_import(tree.body):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = [part for each in node.targets for part in getattr(each, "elts", [each])]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        hits = {root_of(target) for target in targets}
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            hits.add(node.target.id)  # `imported |= ...` changes a set in place
        if isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign)) and node.value is not None:
            for call in ast.walk(node.value):
                if not isinstance(call, ast.Call):
                    continue
                if isinstance(call.func, ast.Attribute) and call.func.attr in MUTATORS:
                    hits.add(root_of(call.func))
                elif ast.unparse(call.func) in ("setattr", "delattr") and call.args:
                    hits.add(ast.unparse(call.args[0]).partition(".")[0])
        if hits & names:
            found.append(node)
    return found


# OpenMP reads it when PyTorch is loaded, so it has to stand there before anything else is imported.
BEFORE_PYTORCH = "os.environ.setdefault('GOMP_SPINCOUNT', '10000')"


def test_no_module_changes_anothers_objects_at_import():
    wrong = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for room in ROOMS
        for path in sources(room)
        for node in touched_at_import(parsed(path))
        if (path.parent.name, ast.unparse(node)) != ("puna", BEFORE_PYTORCH)
    }
    assert not wrong, sorted(wrong)


@pytest.mark.parametrize(
    "line",
    [
        'NAMES.add("native")', "NAMES |= {1}", "NAMES.inner.append(1)", "NAMES[0] = 1",
        "NAMES.attribute = 1", "m.NAMES.update({})", "del NAMES[0]", "kept = NAMES.pop()",
        'setattr(m, "x", 1)', "m.x, own = 1, 2", "if True:\n    NAMES.clear()",
    ],
)  # fmt: skip
def test_such_a_change_is_seen(line):
    start = "import there.m as m\nfrom there import NAMES\nown = set()\n"
    assert touched_at_import(ast.parse(start + line))
    assert not touched_at_import(
        ast.parse(start + line.replace("NAMES", "own").replace("m.", "k.").replace("(m,", "(k,"))
    )
    assert not touched_at_import(
        ast.parse(f"{start}def later():\n    {line.splitlines()[-1].strip()}")
    )


def test_nothing_runs_at_import():
    """No module calls argparse, asks for a device or sets a global when it is imported."""
    suspicious = re.compile(
        r"argparse|set_default_(dtype|device)|cuda\.is_available|set_num_threads|manual_seed"
        r"|os\.environ\[|basicConfig"
    )
    wrong = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for room in ROOMS
        for path in sources(room)
        for node in run_at_import(parsed(path).body)
        if isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign))
        and not isinstance(node.value, ast.Constant)
        and "__main__" not in ast.unparse(node)
        and suspicious.search(ast.unparse(node))
    }
    assert not wrong, sorted(wrong)


def test_inits_are_one_docstring():
    """Only kernels, the folder that is copied, and puna, the front door, name their public
    functions in `__init__.py`."""
    long = [
        str(path.relative_to(ROOT))
        for room in ROOMS
        if room not in ("kernels", "puna")
        for path in tracked(f"{room}/__init__.py", f"{room}/**/__init__.py")
        if len(parsed(path).body) != 1
    ]
    assert not long, long


def test_files_are_replaced_in_one_place():
    """Only core/checkpoint/atomic.py puts one file or folder in another's place."""
    wrong = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for room in ROOMS
        for path in sources(room)
        if path != ROOT / "core" / "checkpoint" / "atomic.py"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "replace"
        and (len(node.args) == 1 and not node.keywords or ast.unparse(node.func.value) == "os")
    }
    assert not wrong, sorted(wrong)


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): count
        for path in tracked("*.py", "*.h", "*.cpp")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > CEILING
    }
    assert not long, f"over {CEILING} lines, split by concern: {long}"


def test_readme_shows_the_rooms_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\W*([a-z_]+)/ ", text, re.M))
    folders = {path.relative_to(ROOT).parts[0] for path in tracked() if path.parent != ROOT}
    assert shown == {name for name in folders if not name.startswith(".")}


def test_no_trace_of_one_machine():
    """Nothing tracked names a place or a host of the machine it was written on."""
    # Spelled in pieces, so that this file does not find itself.
    forbidden = re.compile(
        "|".join(["/" + "work/", "/" + "home/[a-z]", "/" + "Users/", "/" + "root/"])
    )
    wrong = []
    for path in tracked():
        try:
            with (
                tokenize.open(path) if path.suffix == ".py" else path.open(encoding="utf-8") as file
            ):
                lines = file.read().splitlines()
        except UnicodeDecodeError:
            continue
        wrong += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(lines, 1)
            if forbidden.search(line)
        ]
    assert not wrong, wrong


def test_installed_names():
    """`puna.core` is importable from anywhere, `core` from nowhere."""
    rooms = [room for room in ROOMS if room != "puna"]
    program = (
        "import importlib.util as u, puna.core; "
        f"print([r for r in {rooms} if u.find_spec('puna.' + r) is None or u.find_spec(r)])"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=Path.home().anchor, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
