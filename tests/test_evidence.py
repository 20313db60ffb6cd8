"""docs/evidence.md quotes what follows from the data beside it; every ablation's configuration builds a model."""

import importlib.util
import json

import pytest
from helpers import ROOT

from self1e import Self1EForSegmentation
from self1e.apps.ablation.report import markdown
from self1e.model.switches import SWITCHES
from self1e.training.arguments import parse

PAGE = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_learning_curves_tables_follow_from_the_csv():
    plot = script("evidence_plot")
    assert plot.tables(plot.read()) in PAGE


@pytest.mark.parametrize(("name", "heading"), [("ablation", "###"), ("ablation_1000", "####")])
def test_the_ablations_tables_follow_from_the_json(name, heading):
    found = json.loads((ROOT / f"docs/evidence/{name}.json").read_text(encoding="utf-8"))
    tables = markdown(found["scores"], found["claims"], found["seconds_per_row"]).strip()
    assert tables.replace("###", heading) in PAGE


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ablation_*.yaml")), ids=lambda path: path.stem)
def test_an_ablations_configuration_builds_a_model(path, tiny_version):
    recipe = ["--config", str(ROOT / "configs/self1e_2b.yaml"), str(path)]
    args = parse([*recipe, "--version", str(tiny_version), "--exp_name", "e"])
    given = {name: getattr(args, name) for name in SWITCHES if getattr(args, name, None) is not None}
    plain = parse([*recipe[:2], "--version", str(tiny_version), "--exp_name", "e"])
    changed = {name: value for name, value in given.items() if value != getattr(plain, name)}
    assert len(changed) == 1
    model = Self1EForSegmentation.from_pretrained(tiny_version, **changed)
    assert {name: getattr(model.config, name) for name in changed} == changed
