"""The semantic sets: label maps (ade20k, cocostuff, mapillary) and parts (paco_lvis, pascal_part)."""

from pathlib import Path

import cv2
import numpy as np

from self1e.synthetic.annotations import annotation, image_entry, share, write, write_png
from self1e.synthetic.scenes import COLOURS, KINDS, Scene, Shape

# Indices: ball, box, tent, light, signboard, basket, wall; apple, broccoli, sea, banana, flower, orange, wall-other.
# mapillary has "Red Paint" ... in the order of COLOURS, then "Wall".
ADE20K = {"circle": 119, "square": 41, "triangle": 114, "star": 82, "cross": 43, "ring": 112, "background": 0}
COCOSTUFF = {"red": 52, "green": 55, "blue": 154, "yellow": 51, "purple": 118, "orange": 54, "background": 172}


def label_map(scene: Scene, classes: dict[str, int], attribute: str, outline: int) -> np.ndarray:
    """uint8 (H, W): the class of every pixel by the shapes' kind or colour, `outline` on their edges."""
    labels = np.full((scene.height, scene.width), classes["background"], np.uint8)
    edges = np.zeros_like(labels)
    for shape in scene.shapes:
        labels[shape.mask > 0] = classes[getattr(shape, attribute)]
        edges |= cv2.morphologyEx(shape.mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)).astype(np.uint8)
    labels[edges > 0] = outline
    return labels


def write_semantic(root: Path, scenes: list[Scene]) -> None:
    """ade20k, cocostuff (on coco/train2017) and mapillary: a quarter of the training scenes each."""
    ade = {name: index + 1 for name, index in ADE20K.items()}  # in the files 0 is `other`
    for scene in share(scenes, 4):
        write(root / f"ade20k/images/training/ADE_train_{scene.id:08d}.jpg", scene.jpeg)
        write_png(root / f"ade20k/annotations/training/ADE_train_{scene.id:08d}.png", label_map(scene, ade, "kind", 0))
        write(root / f"coco/train2017/{scene.id:012d}.jpg", scene.jpeg)
        write_png(root / f"cocostuff/train2017/{scene.id:012d}.png", label_map(scene, COCOSTUFF, "colour", 255))
    paints = {colour: i for i, colour in enumerate(COLOURS)} | {"background": len(COLOURS)}
    for scene in share(scenes, 16):
        write(root / f"mapillary/training/images/shapes_{scene.id}.jpg", scene.jpeg)
        labels = label_map(scene, paints, "colour", paints["background"])
        write_png(root / f"mapillary/training/v2.0/labels/shapes_{scene.id}.png", labels)
    painted = [(f"object--paint--{colour}", f"{colour.title()} Paint", rgb) for colour, rgb in COLOURS.items()]
    readable = [
        {"name": name, "readable": text, "color": rgb, "evaluate": True, "instances": False}
        for name, text, rgb in [*painted, ("construction--barrier--wall", "Wall", (128, 128, 128))]
    ]
    write(root / "mapillary/config_v2.0.json", {"version": "2.0", "labels": readable})


def halves(shape: Shape, centre: float, axis: int) -> list[np.ndarray]:
    """The visible pixels of a shape before and behind the centre in y (axis 0) or x (axis 1)."""
    before = np.arange(shape.mask.shape[axis]) < round(centre)
    before = before[:, None] if axis == 0 else before
    return [shape.mask * before, shape.mask * ~before]


def write_parts(root: Path, scenes: list[Scene]) -> None:
    """paco_lvis (whole shapes, upper and lower halves) and pascal_part (left and right halves), 1/16 of the scenes."""
    for file, photos, name, parts, masks in (
        (
            "vlpart/paco/annotations/paco_lvis_v1_train.json", "coco", "train2017/{:012d}.jpg",
            ("_(shape)", "_(shape):upper_half_(part)", "_(shape):lower_half_(part)"),
            lambda shape: [None, *halves(shape, shape.y, 0)],
        ),
        (
            "vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages", "2010_{:06d}.jpg",
            (":left half", ":right half"), lambda shape: halves(shape, shape.x, 1),
        ),
    ):  # fmt: skip
        names = [kind + part for kind in KINDS for part in parts]
        kinds = [
            {"id": i, "name": x, "supercategory": ("OBJECT", "PART")[":" in x]} for i, x in enumerate(names, start=1)
        ]
        made: dict[str, list] = {"images": [], "annotations": [], "categories": kinds}
        for scene in share(scenes, 16):
            write(root / photos / name.format(scene.id), scene.jpeg)
            made["images"].append(image_entry(scene, name.format(scene.id)))
            for shape in scene.shapes:
                for i, mask in enumerate(masks(shape)):
                    ann_id, category = len(made["annotations"]) + 1, KINDS.index(shape.kind) * len(parts) + i + 1
                    made["annotations"].append(annotation(shape, ann_id, scene.id, mask, category_id=category))
        write(root / file, made)
