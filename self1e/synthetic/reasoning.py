"""ReasonSeg: riddles about the kind of a shape, polygons in LabelMe's format, explanations."""

from pathlib import Path

import numpy as np

from self1e.synthetic.annotations import share, write
from self1e.synthetic.scenes import Scene
from self1e.synthetic.words import RIDDLES


def write_reasoning(root: Path, groups: dict[str, list[Scene]], seed: int) -> None:
    """ReasonSeg: riddles about the kind of a shape; phrases and sentences in turns, half of train explained."""
    explained = []
    for split, group, parts in (("train", "train", 8), ("val", "val", 2), ("test", "testA", 2)):
        for i, scene in enumerate(share(groups[group], parts)):
            rng = np.random.default_rng([seed, scene.id, 3])
            # The front shape is in full view, and so is every shape that nothing covers: polygons can draw them.
            clear = [shape for shape in scene.shapes if not shape.occluded]
            hidden = {shape.kind for shape in scene.shapes if shape.occluded}
            kinds = sorted({shape.kind for shape in clear} - hidden)
            if not kinds:
                continue
            kind = kinds[rng.integers(len(kinds))]
            phrase, question, reason = RIDDLES[kind]
            polygons = [("target", shape) for shape in clear if shape.kind == kind]
            polygons += [("ignore", shape) for shape in clear if shape.kind != kind and i % 4 == 0][:1]
            name = f"{scene.id}_shapes"
            record = {
                "text": [question] if i % 2 else [phrase],
                "is_sentence": bool(i % 2),
                "shapes": [labelme(f"{name}.jpg", label, part) for label, shape in polygons for part in shape.parts],
            }
            write(root / split / f"{name}.jpg", scene.jpeg)
            write(root / split / f"{name}.json", record)
            if split == "train" and i % 2:
                files = {"image": f"{name}.jpg", "json": f"{name}.json"}
                explained.append({"query": question, "outputs": f"The {kind} is meant, because {reason}.", **files})
    write(root / "explanatory/train.json", explained)


def labelme(image: str, label: str, part: list[float]) -> dict:
    return {
        "label": label, "labels": [label], "shape_type": "polygon", "image_name": image,
        "points": np.reshape(part, (-1, 2)).tolist(), "group_id": None, "group_ids": [None], "flags": {},
    }  # fmt: skip
