"""The project's own files agree with each other: requirements, lock, version, citation, scripts."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_the_package_with_training_and_tests():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    extras = PROJECT["optional-dependencies"]
    assert [line for line in lines if line] == [*PROJECT["dependencies"], *extras["train"], *extras["test"]]


def declared(*extras: str) -> set[str]:
    """Canonical names of the package's dependencies and of those that the extras add."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_what_is_imported_is_declared():
    """Not brought by chance by another package; what only an extra brings is imported where it is used."""
    owners = packages_distributions()
    with_an_extra = {"lmms_eval.py": "lmms-eval"}
    for file in ROOT.glob("self1e/**/*.py"):
        there = declared("train", *([with_an_extra[file.name]] if file.name in with_an_extra else []))
        for node in ast.parse(file.read_text()).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in {module.split(".")[0] for module in modules} - {"self1e"} - sys.stdlib_module_names:
                served = {canonicalize_name(owner) for owner in owners.get(name, [name])}
                assert served & there, f"{file} imports {name}, which no requirement names"


def test_the_lock_is_of_this_project_and_of_the_public_index():
    text = (ROOT / "uv.lock").read_text()
    assert set(re.findall(r"https?://([^/\"]+)", text)) <= {"pypi.org", "files.pythonhosted.org"}
    (locked,) = [package for package in tomllib.loads(text)["package"] if package["name"] == PROJECT["name"]]
    assert set(locked["metadata"]["provides-extras"]) == set(PROJECT["optional-dependencies"])
    names = {entry["name"] for entry in locked["metadata"]["requires-dist"]}
    assert names == declared(*PROJECT["optional-dependencies"])


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
