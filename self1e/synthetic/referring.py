"""The referring sets: refcoco, refcoco+, refcocog, grefcoco on COCO photos, refclef on SAIAPR TC-12 photos."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np

from self1e.synthetic.annotations import annotation, annotation_id, categories, image_entry, share, write
from self1e.synthetic.scenes import CATEGORY, Scene, Shape
from self1e.synthetic.words import absent, phrases, sentence


class Referring(list[dict]):
    """The refs of one referring set; ids of sentences count up from `next_sentence`."""

    def __init__(self, next_sentence: int):
        self.next_sentence = next_sentence

    def add(self, scene: Scene, split: str, shapes: list[Shape], texts: list[str], *, generalised: bool = False):
        sentences = []
        for text in texts:
            plain = text.lower().rstrip(".")
            sentences.append({"tokens": plain.split(), "raw": text, "sent_id": self.next_sentence, "sent": plain})
            self.next_sentence += 1
        ann_ids: list = [annotation_id(scene, shape) for shape in shapes] or [-1]
        classes: list = [CATEGORY[shape.kind] for shape in shapes] or [-1]
        name = scene.coco_name if generalised else scene.coco_name.replace(".jpg", f"_{ann_ids[0]}.jpg")
        self.append({
            "sent_ids": [entry["sent_id"] for entry in sentences], "file_name": name, "ref_id": len(self) + 1,
            "image_id": scene.id, "split": split, "sentences": sentences,
            "ann_id": ann_ids if generalised else ann_ids[0],
            "category_id": classes if generalised else classes[0],
            **({"no_target": not shapes} if generalised else {}),
        })  # fmt: skip


def write_referring(root: Path, groups: dict[str, list[Scene]], seed: int) -> None:
    """refcoco, refcoco+, refcocog, grefcoco, refclef: two expressions per shape in every set but grefcoco.

    The first names colour and kind; the second is another look, or, where the set allows it, a place.
    """
    sets = {
        name: Referring(10**6 * i)
        for i, name in enumerate(("refcoco", "refcoco+", "refcocog", "grefcoco", "refclef"), start=1)
    }
    images, annotations = [], []
    for split, scenes in groups.items():
        for scene in scenes:
            rng = np.random.default_rng([seed, scene.id, 1])
            write(root / "images/mscoco/images/train2014" / scene.coco_name, scene.jpeg)
            images.append(image_entry(scene, scene.coco_name))
            annotations += [annotation(shape, annotation_id(scene, shape), scene.id) for shape in scene.shapes]
            refer(rng, scene, split, sets)
    instances = {"images": images, "annotations": annotations, "categories": categories()}
    for name in ("refcoco", "refcoco+", "refcocog", "grefcoco"):
        write(root / name / "instances.json", instances)
    write_refclef(root, groups, sets["refclef"], seed)
    # Protocol 2, as on the web.
    write(root / "refcoco/refs(unc).p", pickle.dumps(list(sets["refcoco"]), protocol=2))
    write(root / "refcoco+/refs(unc).p", pickle.dumps(list(sets["refcoco+"]), protocol=2))
    write(root / "refcocog/refs(umd).p", pickle.dumps(list(sets["refcocog"]), protocol=2))
    write(root / "grefcoco/grefs(unc).json", sets["grefcoco"])


def refer(rng: np.random.Generator, scene: Scene, split: str, sets: dict[str, Referring]) -> None:
    """Add one scene's expressions to the four sets on COCO photos."""

    def pick(texts: list[str]) -> list[str]:
        return [texts[rng.integers(len(texts))]] if texts else []

    for shape in scene.shapes:
        look, place = phrases(scene, shape)
        sets["refcoco"].add(scene, split, [shape], [shape.name, *pick(look[1:] + place)])
        sets["refcoco+"].add(scene, split, [shape], [shape.name, *pick(look[1:])])
        umd = {"testA": "test", "testB": "test"}.get(split, split)
        sets["refcocog"].add(scene, umd, [shape], [f"The {shape.name}.", sentence(rng, scene, shape)])

    add = partial(sets["grefcoco"].add, scene, split, generalised=True)
    one, two = (scene.shapes[i] for i in rng.choice(len(scene.shapes), 2, replace=False))
    rest = [shape for shape in scene.shapes if shape is not one]
    add([one], [one.name])
    add([one, two], [f"the {one.name} and the {two.name}"])
    add(rest, [f"everything but the {one.name}"])
    add([], [" ".join(absent(rng, scene))])


def write_refclef(root: Path, groups: dict[str, list[Scene]], refs: Referring, seed: int) -> None:
    """refclef: a quarter of the scenes again, as SAIAPR TC-12 photos."""
    images, annotations = [], []
    for split, name in (("train", "train"), ("val", "val"), ("testA", "test")):
        for scene in share(groups[split], 4):
            rng = np.random.default_rng([seed, scene.id, 2])
            file_name = f"{scene.id % 40:02d}/images/{scene.id}.jpg"
            write(root / "images/saiapr_tc-12" / file_name, scene.jpeg)
            images.append(image_entry(scene, file_name))
            for shape in scene.shapes:
                annotations.append(annotation(shape, annotation_id(scene, shape), scene.id))
                texts = [text for texts in phrases(scene, shape) for text in texts]
                refs.add(scene, name, [shape], [texts[rng.integers(len(texts))]])
                refs[-1]["file_name"] = f"{scene.id}_{annotation_id(scene, shape)}.jpg"
    write(root / "refclef/instances.json", {"images": images, "annotations": annotations, "categories": categories()})
    write(root / "refclef/refs(unc).p", pickle.dumps(list(refs), protocol=2))
