"""The project's own files agree with each other: requirements, lock, version, citation, scripts."""

import re
import subprocess
import tomllib

import yaml
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_are_the_package_with_training_and_tests():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    extras = PROJECT["optional-dependencies"]
    assert [line for line in lines if line] == [*PROJECT["dependencies"], *extras["train"], *extras["test"]]


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
