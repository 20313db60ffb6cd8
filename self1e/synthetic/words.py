"""What is said about a scene: expressions that hold for one shape only, sentences, riddles, questions with answers."""

import numpy as np

from self1e.synthetic.scenes import PAIRS, Scene, Shape

RIDDLES = {  # kind: (phrase, sentence, reason)
    "circle": ("the shape that would roll like a ball", "Which round shape has no hole?", "it is round and full"),
    "square": ("the shape with four corners", "Which shape has four equal sides?", "it has four equal sides"),
    "triangle": ("the shape of a warning sign", "Which shape has exactly three corners?", "it has three corners"),
    "star": ("the shape one sees in the night sky", "Which shape has five points?", "it has five points"),
    "cross": ("the shape that stands for first aid", "Which shape has four equal arms?", "it has four arms"),
    "ring": ("the shape worn on a finger", "Which shape has a hole in the middle?", "it has a hole in the middle"),
}


def a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def places(scene: Scene, shape: Shape, rivals: list[Shape]) -> list[str]:
    """Words for where `shape` is, that single it out among `rivals` by a clear margin."""
    right = [shape.x - other.x for other in rivals]
    down = [shape.y - other.y for other in rivals]
    gaps = {"leftmost": [-x for x in right], "rightmost": right, "top": [-y for y in down], "bottom": down}
    margin = 0.12 * max(scene.height, scene.width)
    return [word for word, values in gaps.items() if min(values, default=0) > margin]


def phrases(scene: Scene, shape: Shape) -> tuple[list[str], list[str]]:
    """Unambiguous expressions by look (the first is colour + kind) and by place."""
    if scene.simple:
        return [shape.name], []
    others = [other for other in scene.shapes if other is not shape]
    same_kind = [other for other in others if other.kind == shape.kind]
    look = [shape.name]
    if not same_kind:
        look.append(shape.kind)
    if shape.colour not in {other.colour for other in others}:
        look.append(f"{shape.colour} shape")
    spots = [f"{word} shape" for word in places(scene, shape, others)]
    return look, spots + [f"{word} {shape.kind}" for word in places(scene, shape, same_kind)]


def sentence(rng: np.random.Generator, scene: Scene, shape: Shape) -> str:
    """A long RefCOCOg-like description."""
    other = scene.shapes[rng.choice([i for i, s in enumerate(scene.shapes) if s is not shape])]
    spots = {"leftmost": "to the left of", "rightmost": "to the right of", "top": "above", "bottom": "below"}
    relations = [f"{spots[word]} the {other.name}" for word in places(scene, shape, [other])]
    relations.append(f"in the picture with the {other.name}")
    return f"The {shape.name} {relations[rng.integers(len(relations))]}."


def absent(rng: np.random.Generator, scene: Scene, *, colour: str | None = None) -> tuple[str, str]:
    """A (colour, kind) that the scene lacks, of the given colour if any."""
    present = {(shape.colour, shape.kind) for shape in scene.shapes}
    pairs = [pair for pair in PAIRS if pair not in present and colour in (None, pair[0])]
    return pairs[rng.integers(len(pairs))]


def facts(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str, str]]:
    """(question, answer, answer type of VQAv2) about a scene."""
    shape = scene.shapes[rng.integers(len(scene.shapes))]
    colour, kind = absent(rng, scene)
    rows = [
        ("How many shapes are there?", str(len(scene.shapes)), "number"),
        (f"Is there {a(shape.name)} in the image?", "yes", "yes/no"),
        (f"Is there {a(colour)} {kind} in the image?", "no", "yes/no"),
    ]
    look, _ = phrases(scene, shape)
    if shape.kind in look:
        rows.append((f"What color is the {shape.kind}?", shape.colour, "other"))
    if f"{shape.colour} shape" in look:
        rows.append((f"Which shape is {shape.colour}?", shape.kind, "other"))
    return [rows[i] for i in rng.permutation(len(rows))]
