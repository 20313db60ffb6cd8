"""The shapes benchmark: what an expression asks for is what its words say, and nothing else in the scene is."""

import numpy as np
import pytest
from helpers import files

from self1e.data.loader import load_split
from self1e.synthetic.benchmark import FAMILIES, MIX, draw_benchmark_scene, make_benchmark

SCENES = range(1, 13)


def scenes(family):
    return [draw_benchmark_scene(i, family, seed=0, size=112) for i in SCENES]


@pytest.mark.parametrize("family", ["thin", "holes", "small", "several", "none"])
def test_names_are_unambiguous(family):
    for scene, expressions in scenes(family):
        names = [shape.name for shape in scene.shapes]
        assert len(set(names)) == len(names)
        for text, targets in expressions:
            if text.startswith("all shapes but the "):
                assert [shape.name for shape in scene.shapes if shape not in targets] == [text[19:]]
            else:
                spoken = text.removeprefix("the ").split(" and the ")
                assert sorted(spoken) == sorted(shape.name for shape in targets) or (
                    family == "none" and not targets and spoken[0] not in names
                )


def test_families_are_what_they_are_called():
    fractions = {
        family: [s.mask.sum() / s.radius**2 for scene, _ in scenes(family) for s in scene.shapes]
        for family in FAMILIES
    }
    assert np.mean(fractions["thin"]) < 0.5 * np.mean(fractions["several"])
    assert all(any(shape.kind == "ring" for shape in scene.shapes) for scene, _ in scenes("holes"))
    assert all(shape.radius < 0.09 * 112 for scene, _ in scenes("small") for shape in scene.shapes)
    assert {len(targets) for _, expressions in scenes("several") for _, targets in expressions} == {2}
    assert all([len(targets) for _, targets in expressions] == [0, 0, 1] for _, expressions in scenes("none"))


def test_relations_tell_two_look_alikes_apart():
    before = {"left of": lambda a, b: a.x < b.x, "right of": lambda a, b: a.x > b.x}
    before |= {"above": lambda a, b: a.y < b.y, "below": lambda a, b: a.y > b.y}
    for scene, expressions in scenes("relations"):
        one, other, landmark = scene.shapes
        assert one.name == other.name != landmark.name
        for text, (target,) in expressions:
            (word,) = [word for word in before if f" {word} the " in text]
            rival = other if target is one else one
            assert before[word](target, landmark) and not before[word](rival, landmark)


def test_superlatives_and_counts():
    best = {"leftmost": lambda s: -s.x, "rightmost": lambda s: s.x, "top": lambda s: -s.y, "bottom": lambda s: s.y}
    best |= {"largest": lambda s: s.radius, "smallest": lambda s: -s.radius}
    for scene, expressions in scenes("superlatives"):
        assert len({shape.name for shape in scene.shapes}) == 1
        for text, targets in expressions:
            assert targets == [max(scene.shapes, key=best[text.split()[1]])]
    for scene, expressions in scenes("counting"):
        colours = [shape.colour for shape in scene.shapes]
        for (_, targets), count in zip(expressions, (2, 1), strict=True):
            assert [colours.count(shape.colour) for shape in targets] == [count] * count


def test_trees_are_seeded_and_read_by_the_data_code(tmp_path):
    root = make_benchmark(tmp_path / "a", train=len(MIX), val=2)
    assert files(root) == files(make_benchmark(tmp_path / "b", train=len(MIX), val=2))
    photos = {path.read_bytes() for path in (root / "train").rglob("*.jpg")}
    for family in FAMILIES:
        split = load_split("grefcoco|unc|val", root / family)
        assert len(split) == 2
        for photo in split:
            _, masks = photo.load()
            assert [not (mask == 1).any() for mask in masks] == list(photo.no_target)
        assert not photos & {path.read_bytes() for path in (root / family).rglob("*.jpg")}
