"""The referring sets: refcoco, refcoco+, refcocog, grefcoco on COCO photos, refclef on SAIAPR TC-12 photos."""

import pickle
from pathlib import Path

import numpy as np

from self1e.synthetic.annotations import annotation, annotation_id, image_entry, share, write
from self1e.synthetic.scenes import CATEGORY, Scene, Shape
from self1e.synthetic.words import absent, phrases, sentence

FILES = dict.fromkeys(("refclef", "refcoco", "refcoco+"), "refs(unc).p")
FILES |= {"refcocog": "refs(umd).p", "grefcoco": "grefs(unc).json"}


def write_referring(root: Path, groups: dict[str, list[Scene]], seed: int) -> None:
    """All sets: two expressions per shape, but for grefcoco, and for refclef, which has one in a quarter of scenes.

    The first names colour and kind; the second is another look, or, where the set allows it, a place.
    """
    refs: dict[str, list[dict]] = {name: [] for name in FILES}
    coco, saiapr = {}, {}
    for split, scenes in groups.items():
        for scene in scenes:
            coco[scene.coco_name] = scene
            refer(np.random.default_rng([seed, scene.id, 1]), scene, split, refs)
        for scene in share(scenes, 4) if split != "testB" else ():
            saiapr[f"{scene.id % 40:02d}/images/{scene.id}.jpg"] = scene
            rng = np.random.default_rng([seed, scene.id, 2])
            for shape in scene.shapes:
                texts = sum(phrases(scene, shape), [])
                add(refs["refclef"], scene, split.removesuffix("A"), [shape], [texts[rng.integers(len(texts))]])
    categories = [{"supercategory": "shape", "id": i, "name": kind} for kind, i in CATEGORY.items()]
    for names, folder, photos in (
        (["refcoco", "refcoco+", "refcocog", "grefcoco"], "mscoco/images/train2014", coco),
        (["refclef"], "saiapr_tc-12", saiapr),
    ):
        instances: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
        for name, scene in photos.items():
            write(root / "images" / folder / name, scene.jpeg)
            instances["images"].append(image_entry(scene, name))
            instances["annotations"] += [annotation(x, annotation_id(scene, x), scene.id) for x in scene.shapes]
        for name in names:
            write(root / name / "instances.json", instances)
            pickled = FILES[name].endswith(".p")  # by protocol 2, as on the web
            write(root / name / FILES[name], pickle.dumps(refs[name], protocol=2) if pickled else refs[name])


def refer(rng: np.random.Generator, scene: Scene, split: str, refs: dict[str, list[dict]]) -> None:
    """Add one scene's expressions to the four sets on COCO photos."""

    def pick(texts: list[str]) -> list[str]:
        return [texts[rng.integers(len(texts))]] if texts else []

    for shape in scene.shapes:
        look, position = phrases(scene, shape)
        add(refs["refcoco"], scene, split, [shape], [shape.name, *pick(look[1:] + position)])
        add(refs["refcoco+"], scene, split, [shape], [shape.name, *pick(look[1:])])
        umd = {"testA": "test", "testB": "test"}.get(split, split)
        add(refs["refcocog"], scene, umd, [shape], [f"The {shape.name}.", sentence(rng, scene, shape)])
    one, two = (scene.shapes[i] for i in rng.choice(len(scene.shapes), 2, replace=False))
    rest = [shape for shape in scene.shapes if shape is not one]
    for shapes, text in (
        ([one], one.name),
        ([one, two], f"the {one.name} and the {two.name}"),
        (rest, f"everything but the {one.name}"),
        ([], " ".join(absent(rng, scene))),
    ):
        add(refs["grefcoco"], scene, split, shapes, [text], generalised=True)


def add(refs: list[dict], scene: Scene, split: str, shapes: list[Shape], texts: list[str], *, generalised=False):
    """Add a ref to those of a set; a generalised one means any number of shapes."""
    plain = [text.lower().rstrip(".") for text in texts]
    sentences = [
        {"tokens": sent.split(), "raw": raw, "sent_id": 10 * len(refs) + i, "sent": sent}
        for i, (raw, sent) in enumerate(zip(texts, plain))
    ]
    ann_ids: list = [annotation_id(scene, shape) for shape in shapes] or [-1]
    classes: list = [CATEGORY[shape.kind] for shape in shapes] or [-1]
    refs.append({
        "sent_ids": [x["sent_id"] for x in sentences], "ref_id": len(refs) + 1, "image_id": scene.id, "split": split,
        "file_name": scene.coco_name if generalised else scene.coco_name.replace(".jpg", f"_{ann_ids[0]}.jpg"),
        "sentences": sentences,
        "ann_id": ann_ids if generalised else ann_ids[0],
        "category_id": classes if generalised else classes[0],
        **({"no_target": not shapes} if generalised else {}),
    })  # fmt: skip
