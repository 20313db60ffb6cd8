"""The house: imports lead downwards, files fit on a few screens, and `import self1e` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

PACKAGE = ROOT / "self1e"
# From the ground up; a room may import its own modules and those of rooms further down.
LAYERS = (
    ("errors",),
    ("files", "flags", "visualize", "stop"),
    ("distributed",),
    ("model",),
    ("data",),
    ("evaluation",),
    ("training",),
    ("synthetic",),
    ("apps",),
    ("cli",),
    ("predict", "demo"),  # what `python -m` calls
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LEVEL["synthetic"] = LEVEL["data"]  # it may use facts of model and data, and only apps and cli may import it
LONGEST = 400


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """The package's modules that a file imports: at its top level, or `everywhere` (in functions too)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = (
        list(ast.walk(tree)) if everywhere else [n for top in tree.body if not is_function(top) for n in ast.walk(top)]
    )
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name for name in found if name in MODULES and name != "self1e"}


def is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "self1e"


def test_every_module_has_a_layer():
    assert {room(name) for name in MODULES} - {"self1e"} <= LEVEL.keys()


def test_imports_lead_downwards():
    upward = []
    for name, path in MODULES.items():
        if name == "self1e":  # the front door names what it offers
            continue
        for target in imported(path, everywhere=True):
            here, there = room(name), room(target)
            allowed = here == there or LEVEL[there] < LEVEL[here]
            if there == "synthetic" and here != there:
                allowed = here in ("apps", "cli", "predict", "demo")
            if not allowed:
                upward.append(f"{name} imports {target}")
    assert not upward


def test_imports_have_no_circle():
    graph = {name: imported(path, everywhere=False) - {name} for name, path in MODULES.items()}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, f"in or above a circle: {sorted(graph)}"


def test_files_fit_on_a_few_screens():
    folders = ("self1e", "scripts", "tests", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_scripts_do_nothing_when_they_are_imported():
    """Processes that they start import them anew, where Python does not fork."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]:
        assert 'if __name__ == "__main__":' in path.read_text(), path


def test_importing_is_light_and_needs_no_unix():
    """In a fresh interpreter where `fcntl` cannot be imported, as on Windows."""
    lines = (
        "import sys; sys.modules['fcntl'] = None",
        "import self1e; print(*sys.modules)",
        "from self1e import Self1EConfig, Self1EForSegmentation, Self1EProcessor",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert not {"torch", "transformers", "cv2", "pycocotools", "deepspeed", "matplotlib"} & set(run.stdout.split())


def test_no_test_waits_without_end():
    """Whatever a test waits for outside of its process has a timeout: a failure must not hang the suite."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                method = ast.unparse(call.func)
                waits = method == "subprocess.run" or call.func.attr in ("communicate", "urlopen")
                waits = waits or (call.func.attr in ("wait", "join") and "process" in method)
                limited = (
                    any(word.arg == "timeout" for word in call.keywords) or call.func.attr == "wait" and call.args
                )
                assert limited or not waits, f"{path}:{call.lineno}: {method} without a timeout"
