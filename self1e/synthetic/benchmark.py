"""The shapes benchmark: scenes in which one part of the method must matter, a held-out split for each difficulty.

    self1e make-shapes runs/shapes --benchmark            # 2,000 + 8 x 100 scenes, 20 MB, 15 s

A scene belongs to one of eight families, and all its expressions ask for what the family is about:

    thin          crosses and rings a few pixels wide                            "the red cross"
    holes         rings with holes of any size among other shapes                "the blue ring"
    small         shapes of 5% to 9% of the photo's shorter side                 "the green square"
    relations     two shapes that look the same beside a landmark                "the red circle above the blue square"
    superlatives  three shapes that look the same                                "the largest red circle"
    counting      two shapes of one colour and one of another                    "the two shapes of the same color"
    several       several shapes                                                 "the red circle and the blue square"
    none          nothing in the photo                                           "the yellow star"

OUTPUT/benchmark/train holds all families, OUTPUT/benchmark/<family> the held-out scenes of one; each is a
gRefCOCO tree of its own (`--dataset_dir`, training set `grefcoco`, split `grefcoco|unc|val`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from self1e.synthetic.annotations import annotation, annotation_id, categories, image_entry, write
from self1e.synthetic.referring import Referring
from self1e.synthetic.scenes import COLOURS, Scene, Shape, place, render
from self1e.synthetic.words import absent, extremes

FAMILIES = ("thin", "holes", "small", "relations", "superlatives", "counting", "several", "none")
# A cycle of training scenes. Names come more often than reasoning, without which "all shapes" is the best answer.
MIX = tuple("thin holes small relations thin holes small superlatives several holes none counting".split())
SOLID = ("circle", "square", "triangle")  # kinds that a model of a million parameters learns in minutes
Expressions = list[tuple[str, list[Shape]]]  # a text and what it asks for
WHERE = {"leftmost": "left of", "rightmost": "right of", "top": "above", "bottom": "below"}


def draw_benchmark_scene(scene_id: int, family: str, *, seed: int, size: int) -> tuple[Scene, Expressions]:
    """Draw a scene of one family with its own generator; also what its expressions ask for."""
    rng = np.random.default_rng([seed, scene_id, 10, FAMILIES.index(family)])
    while True:  # until the family's words fit the scene
        pairs = choose(rng, family)
        radius = {"small": (0.05, 0.09), "relations": (0.12, 0.18), "superlatives": (0.09, 0.22)}.get(
            family, (0.15, 0.26)
        )
        shapes, masks = place(
            rng, size, size, pairs, radius=radius, hole=hole_of(rng, family), arm=0.1 if family == "thin" else 0.36
        )
        scene = Scene(scene_id, size, size, b"", shapes)
        expressions = SAYINGS.get(family, by_name)(rng, scene)
        if expressions:
            break
    scene.jpeg = render(rng, shapes, masks)
    return scene, expressions


def hole_of(rng: np.random.Generator, family: str) -> float:
    """A ring's hole as a fraction of its radius."""
    return {"thin": 0.8, "holes": rng.uniform(0.3, 0.7)}.get(family, 0.55)


def choose(rng: np.random.Generator, family: str) -> list[tuple[str, str]]:
    """The (colour, kind) of a scene's shapes, from back to front."""
    first, second, third = (str(colour) for colour in rng.choice(list(COLOURS), 3, replace=False))
    kinds = [str(kind) for kind in rng.choice(SOLID, 3)]
    if family == "thin":
        kinds = [str(kind) for kind in rng.choice(("cross", "ring"), 3)]
    if family == "holes":
        kinds[: 1 + rng.integers(2)] = ["ring", "ring"][: 1 + rng.integers(2)]
    if family == "relations":
        return [(first, kinds[0]), (first, kinds[0]), (second, kinds[1])]
    if family == "superlatives":
        return [(first, kinds[0])] * 3
    if family == "counting":
        return [(first, kinds[0]), (first, kinds[1]), (second, kinds[2])]
    return list(zip((first, second, third), kinds))


def by_name(rng: np.random.Generator, scene: Scene) -> Expressions:
    return [(f"the {shape.name}", [shape]) for shape in scene.shapes]


def by_relation(rng: np.random.Generator, scene: Scene) -> Expressions:
    one, other, landmark = scene.shapes
    found = []
    for shape, rival in ((one, other), (other, one)):
        _, mine = extremes(scene, shape, [landmark])
        _, its = extremes(scene, rival, [landmark])
        opposite = {"leftmost": "rightmost", "rightmost": "leftmost", "top": "bottom", "bottom": "top"}
        found += [
            (f"the {shape.name} {WHERE[word]} the {landmark.name}", [shape]) for word in mine if opposite[word] in its
        ]
    return found


def by_superlative(rng: np.random.Generator, scene: Scene) -> Expressions:
    found: Expressions = []
    for shape in scene.shapes:
        rivals = [other for other in scene.shapes if other is not shape]
        size, place = extremes(scene, shape, rivals)
        found += [(f"the {word} {shape.name}", [shape]) for word in size + place]
    return [found[i] for i in rng.permutation(len(found))[:3]]


def by_count(rng: np.random.Generator, scene: Scene) -> Expressions:
    one, other, alone = scene.shapes
    return [("the two shapes of the same color", [one, other]), ("the one shape of its color", [alone])]


def by_list(rng: np.random.Generator, scene: Scene) -> Expressions:
    one, two, three = (scene.shapes[i] for i in rng.permutation(3))
    return [
        (f"the {one.name} and the {two.name}", [one, two]),
        (f"all shapes but the {three.name}", [one, two]),
    ]


def of_nothing(rng: np.random.Generator, scene: Scene) -> Expressions:
    colours = {shape.colour for shape in scene.shapes}
    colour = str(rng.choice([colour for colour in COLOURS if colour not in colours]))
    here = scene.shapes[rng.integers(len(scene.shapes))]
    return [
        (f"the {colour} {absent(rng, scene, colour=colour)[1]}", []),
        (f"the {' '.join(absent(rng, scene, colour=here.colour))}", []),
        (f"the {here.name}", [here]),
    ]


SAYINGS: dict[str, Callable[[np.random.Generator, Scene], Expressions]] = {
    "relations": by_relation,
    "superlatives": by_superlative,
    "counting": by_count,
    "several": by_list,
    "none": of_nothing,
}


def make_benchmark(
    path: str | Path, *, train: int = 2000, val: int = 100, size: int = 112, seed: int = 0, progress: bool = False
) -> Path:
    """Write the trees below `path` and return it: `train` training scenes, `val` held-out scenes per family.

    `size`: pixels of a photo's side. Raises ValueError when there are too few scenes or pixels.
    """
    if train < len(MIX) or val < 1:
        raise ValueError(f"--train {train} --val {val}: every family needs a training scene and a held-out scene")
    if size < 96:
        raise ValueError(f"--size {size}: small shapes would have no pixels, use 96 or more")
    root, next_id = Path(path), 1
    for name, count in (("train", train), *((family, val) for family in FAMILIES)):
        references, images, annotations = Referring(10**6), [], []
        tree = root / name / "refer_seg"
        ids = range(next_id, next_id + count)
        next_id += count
        for scene_id in tqdm(ids, desc=name, mininterval=1, disable=not progress):
            family = MIX[scene_id % len(MIX)] if name == "train" else name
            scene, expressions = draw_benchmark_scene(scene_id, family, seed=seed, size=size)
            write(tree / "images/mscoco/images/train2014" / scene.coco_name, scene.jpeg)
            images.append(image_entry(scene, scene.coco_name))
            annotations += [annotation(shape, annotation_id(scene, shape), scene.id) for shape in scene.shapes]
            split = "train" if name == "train" else "val"
            for text, shapes in expressions:
                references.add(scene, split, shapes, [text], generalised=True)
        instances = {"images": images, "annotations": annotations, "categories": categories()}
        write(tree / "grefcoco/instances.json", instances)
        write(tree / "grefcoco/grefs(unc).json", references.refs)
    return root
