"""The project's own files agree with each other: requirements, lock, version, citation, scripts."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires

import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_the_package_with_training_and_tests():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    extras = PROJECT["optional-dependencies"]
    assert [line for line in lines if line] == [*PROJECT["dependencies"], *extras["train"], *extras["test"]]


def brought(names: Iterable[str]) -> set[str]:
    """The distributions of these requirements and all that they require in turn, by canonical name."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            key = canonicalize_name(wanted.name) + (f"[{extra}]" if extra else "")
            if key not in found and (wanted.marker is None or wanted.marker.evaluate()):
                found.add(key)
                lines = map(Requirement, requires(wanted.name) or [])
                waiting += [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
    return found


def top_level_imports(source: str) -> set[str]:
    """The packages that a module imports when it is imported itself."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names} - {PROJECT["name"]} - set(sys.stdlib_module_names)


def test_a_fresh_environment_holds_what_is_imported():
    """An import that only an extra or a leftover of this environment serves would break the quickstart."""
    there = brought([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]])
    owners = packages_distributions()
    apps = ROOT / "self1e/apps"
    with_an_extra = {apps / "page.py", apps / "gate.py", *apps.glob("lmms_eval/**/*.py")}
    for file in {*ROOT.glob("self1e/**/*.py")} - with_an_extra:
        for name in top_level_imports(file.read_text()):
            served = {canonicalize_name(owner) for owner in owners.get(name, ())}
            assert served & there, f"{file} imports {name}, which no requirement brings"


def test_the_lock_is_of_this_project_and_of_the_public_index():
    text = (ROOT / "uv.lock").read_text()
    assert set(re.findall(r"https?://([^/\"]+)", text)) <= {"pypi.org", "files.pythonhosted.org"}
    (locked,) = [package for package in tomllib.loads(text)["package"] if package["name"] == PROJECT["name"]]
    assert set(locked["metadata"]["provides-extras"]) == set(PROJECT["optional-dependencies"])
    declared = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in declared}
    assert {entry["name"] for entry in locked["metadata"]["requires-dist"]} == names - {PROJECT["name"]}


def test_the_version_is_one():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_is_the_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    readme = (ROOT / "README.md").read_text()
    title = re.search(r"title\s+= \{(.*)\},", readme)[1].replace("{", "").replace("}", "")
    assert cited["title"] == title
    names = [f"{author['family-names']}, {author['given-names']}" for author in cited["authors"]]
    assert " and ".join(names) in readme and "zhang2026self1e" in readme


def test_shell_scripts_parse():
    for script in [*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]:
        subprocess.run(["bash", "-n", script], check=True, timeout=60)
