"""The house: imports lead downwards without circles, and files fit on a few screens."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from helpers import ROOT

# From the ground up: a module may import modules of its own room and of rooms further down.
ROOMS = (
    *("errors", "files stop", "flags", "distributed", "model", "visualize", "data", "synthetic", "evaluation"),
    *("training", "apps", "cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms.split()}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "self1e").rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found & MODULES.keys() - {"self1e"}


def test_imports_lead_downwards_without_circles():
    graph = {name: imported(path) - {name} for name, path in MODULES.items() if name != "self1e"}
    room = {name: name.split(".")[1] for name in graph}
    upward = [f"{name} imports {target}" for name, targets in graph.items() for target in targets
              if room[name] != room[target] and LEVEL[room[name]] <= LEVEL[room[target]]]  # fmt: skip
    assert not upward
    TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def test_only_programs_and_developers_commands_import_synthetic_data():
    users = {name.split(".")[1] for name, path in MODULES.items() if any("synthetic" in t for t in imported(path))}
    assert users <= {"synthetic", "apps"}


def test_files_fit_on_a_few_screens():
    files = [path for folder in ("self1e", "scripts", "tests", "examples") for path in (ROOT / folder).rglob("*")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files
        if path.suffix in (".py", ".sh")
    }
    assert not {name: length for name, length in lengths.items() if length > 500}
