"""The semantic sets: label maps (ade20k, cocostuff, mapillary) and parts (paco_lvis, pascal_part)."""

from pathlib import Path

import cv2
import numpy as np

from self1e.synthetic.annotations import annotation, image_entry, share, write, write_png
from self1e.synthetic.scenes import COLOURS, KINDS, Scene

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
    names = [(f"object--paint--{colour}", f"{colour.title()} Paint", rgb) for colour, rgb in COLOURS.items()]
    names.append(("construction--barrier--wall", "Wall", (128, 128, 128)))
    paint_labels = [
        {"name": name, "readable": readable, "color": list(rgb), "evaluate": True, "instances": False}
        for name, readable, rgb in names
    ]
    write(root / "mapillary/config_v2.0.json", {"version": "2.0", "labels": paint_labels})


def write_parts(root: Path, scenes: list[Scene]) -> None:
    """paco_lvis (whole shapes, upper and lower halves) and pascal_part (left and right halves), 1/16 of the scenes."""
    paco: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    pascal: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    for i, kind in enumerate(KINDS):
        paco["categories"] += [
            {"id": 3 * i + 1, "name": f"{kind}_(shape)", "supercategory": "OBJECT"},
            {"id": 3 * i + 2, "name": f"{kind}_(shape):upper_half_(part)", "supercategory": "PART"},
            {"id": 3 * i + 3, "name": f"{kind}_(shape):lower_half_(part)", "supercategory": "PART"},
        ]
        pascal["categories"] += [
            {"id": 2 * i + 1, "name": f"{kind}:left half", "supercategory": "PART"},
            {"id": 2 * i + 2, "name": f"{kind}:right half", "supercategory": "PART"},
        ]
    for scene in share(scenes, 16):
        file_name = f"{scene.id:012d}.jpg"
        write(root / "coco/train2017" / file_name, scene.jpeg)
        paco["images"].append(image_entry(scene, f"train2017/{file_name}"))
        voc_name = f"2010_{scene.id:06d}.jpg"
        write(root / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages" / voc_name, scene.jpeg)
        pascal["images"].append(image_entry(scene, voc_name))
        for shape in scene.shapes:
            mask, first = shape.mask, KINDS.index(shape.kind)
            upper, left = np.zeros_like(mask), np.zeros_like(mask)
            upper[: round(shape.y)], left[:, : round(shape.x)] = 1, 1
            for i, part in enumerate((None, mask & upper, mask & ~upper & 1)):
                ann_id = len(paco["annotations"]) + 1
                entry = annotation(shape, ann_id, scene.id, part, category_id=3 * first + 1 + i)
                # `obj_ann_id` is the id of the whole shape.
                paco["annotations"].append(
                    entry | {"obj_ann_id": ann_id - i, "attribute_ids": [], "dom_color_ids": []}
                )
            for i, part in enumerate((mask & left, mask & ~left & 1)):
                ann_id = len(pascal["annotations"]) + 1
                pascal["annotations"].append(annotation(shape, ann_id, scene.id, part, category_id=2 * first + 1 + i))
    write(root / "vlpart/paco/annotations/paco_lvis_v1_train.json", paco)
    write(root / "vlpart/pascal_part/train.json", pascal)
