"""The layers of the house, read from the source. Run: python -m pytest tests/test_imports.py"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "resilient_t5"
LAYERS = {
    "errors": 0,
    "files": 1,
    "hub": 1,
    "host_memory": 1,
    "config": 2,
    "checkpoint": 3,
    "data": 3,
    "model": 3,
    "restoration": 4,
    "training": 5,
    "commands": 6,
}
ROOMS: dict[str, set[str]] = {
    "data.corpus": set(),
    "data.tokenizer": set(),
    "data.corruption": {"data.tokenizer"},
    "data.store": {"data.corpus", "data.corruption", "data.tokenizer"},
    "restoration.scoring": set(),
    "training.convergence": set(),
    "training.hardware": set(),
    "training.telemetry": {"training.convergence"},
    "training.reports": {"training.convergence", "training.hardware", "training.telemetry"},
    "training.entrypoints": {"training.hardware", "training.reports", "training.telemetry"},
}
"""The folders inside a part, each with the other folders of that part that it may import."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """`resilient_t5.data.corpus.documents` -> `data`."""
    return module.split(".")[1]


def room_of(module: str) -> str:
    """`resilient_t5.data.corpus.documents` -> `data.corpus`; a file that lies beside the rooms is a room by itself."""
    return ".".join(module.split(".")[1:3])


def name_of(path: Path) -> str:
    """The dotted name of a module file."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> list[str]:
    """Every module of this package that `path` imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
    return [name for name in names if name.startswith("resilient_t5.")]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_down_the_layers(path):
    """No module imports from a layer above its own, or from another part of its own layer."""
    here = name_of(path)
    if here == "resilient_t5":
        assert imported(path) == []
        return
    for there in imported(path):
        inside = part_of(there) == part_of(here)
        assert inside or LAYERS[part_of(there)] < LAYERS[part_of(here)], f"{here} imports {there}"


def test_rooms_import_the_rooms_that_they_may():
    """A folder inside a part imports of the other folders only those named in ROOMS, and every folder is named there."""
    found: dict[str, set[str]] = {
        room_of(name_of(path)): set() for path in MODULES if len(path.relative_to(PACKAGE).parts) == 3
    }
    for path in MODULES:
        here = room_of(name_of(path))
        if here in found:
            found[here] |= {room_of(there) for there in imported(path)} & found.keys() - {here}
    inside = {
        here: {room for room in rooms if room.partition(".")[0] == here.partition(".")[0]} for here, rooms in found.items()
    }
    assert inside == ROOMS


def test_no_cycles_between_rooms():
    """Taken as one, the files of a folder still import nothing that imports them."""
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        here = room_of(name_of(path))
        graph.setdefault(here, set()).update({room_of(there) for there in imported(path)} - {here})
    assert_no_cycle(graph)


def test_no_cycles_between_modules():
    """Following imports never comes back to where it began."""
    assert_no_cycle({name_of(path): set(imported(path)) for path in MODULES})


def assert_no_cycle(graph: dict[str, set[str]]) -> None:
    """Fail with the way round when following the edges comes back to where it began."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_only_two_modules_import_torch_below_data():
    """Everything in data/ works without torch, but batches and their copy to a GPU."""
    for path in (PACKAGE / "data").rglob("*.py"):
        roots = {name.partition(".")[0] for name in _all_imports(path)}
        assert "torch" not in roots or path.name in ("batches.py", "pass_input.py"), path.name


@pytest.mark.parametrize("module", ["pickle", "marshal", "shelve", "dill"])
def test_no_module_can_read_a_pickle(module):
    """No pickle anywhere, no torch.save, and torch.load in one place, for tensors only."""
    for path in MODULES:
        assert module not in {name.partition(".")[0] for name in _all_imports(path)}, path
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "torch.save" not in {ast.unparse(call.func) for call in calls}, path
        for call in calls:
            if ast.unparse(call.func) == "torch.load":
                assert path.name == "weights.py"
                assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords]


def test_importing_the_package_is_quick_and_loads_no_torch():
    """`import resilient_t5` takes under 0.2 s, since it imports nothing heavy."""
    code = (
        "import time; t = time.perf_counter(); import resilient_t5, sys; print(time.perf_counter() - t, 'torch' in sys.modules)"
    )
    seconds, torch_loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 0.2
    assert torch_loaded == "False"


@pytest.mark.slow
def test_every_module_imports_quietly():
    """Importing every module prints nothing and installs no signal handler."""
    names = [name_of(path) for path in MODULES]
    code = (
        "import importlib, signal\n"
        "before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]\n"
        f"[importlib.import_module(name) for name in {names!r}]\n"
        "assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_every_public_function_has_a_docstring():
    """A public function or class says what it does."""
    bare = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # forward and backward are torch's names; what they do is said by their class.
            is_torch_method = isinstance(node, ast.FunctionDef) and node.name in ("forward", "backward")
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not (node.name.startswith("_") or is_torch_method)
            if public and ast.get_docstring(node) is None and not _is_nested(node, path):
                bare.append(f"{name_of(path)}:{node.lineno} {node.name}")
    assert bare == []


def _is_nested(node: ast.AST, path: Path) -> bool:
    """Whether a function stands inside another function, where a name and its place say enough."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [outer for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef)]
    return any(outer.lineno < node.lineno and (outer.end_lineno or 0) >= (node.end_lineno or 0) for outer in functions)


def _all_imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
    return names
