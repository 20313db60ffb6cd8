"""Make a synthetic dataset tree in the real formats: coloured shapes on photo-like backgrounds.

For the quickstart and tests: everything that reads COCO, RefCOCO, ReasonSeg, ADE20K, VQAv2 ... reads this.

    self1e make-shapes runs/shapes                        # 2,000 + 300 scenes, 120 MB, 25 s
    self1e make-shapes runs/few --train 8 --val 3         # for a look, 1 s

OUTPUT/dataset holds the segmentation and conversation sets, OUTPUT/data the VQA sets (README, "Datasets"). A scene is
one photo with two to four shapes, no two alike in colour and kind, which may overlap: an annotation is what is
visible. There are `--train` scenes for training and three groups of `--val` held-out scenes (val, testA or test,
testB); no held-out photo is in a training set. Same options, same bytes (numpy Generators, one a scene).

What the semantic sets call the shapes (index in the set's class list):
    ade20k     by kind:   circle ball 119, square box 41, triangle tent 114, star light 82, cross signboard 43,
                          ring basket 112, background wall 0; outlines are `other`
    cocostuff  by colour: red apple 52, green broccoli 55, blue sea 154, yellow banana 51, purple flower 118,
                          orange orange 54, background wall-other 172; outlines are 255
    mapillary  by colour: "Red Paint" ..., in the order of COLOURS, then "Wall"
"""

import argparse
import base64
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

COLOURS = {  # RGB
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (38, 84, 214),
    "yellow": (240, 220, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 20),
}
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
CATEGORY = {kind: i for i, kind in enumerate(KINDS, start=1)}
PAIRS = [(colour, kind) for colour in COLOURS for kind in KINDS]
ADE20K = {"circle": 119, "square": 41, "triangle": 114, "star": 82, "cross": 43, "ring": 112, "background": 0}
COCOSTUFF = {"red": 52, "green": 55, "blue": 154, "yellow": 51, "purple": 118, "orange": 54, "background": 172}
RIDDLES = {  # kind: (phrase, sentence, reason)
    "circle": ("the shape that would roll like a ball", "Which round shape has no hole?", "it is round and full"),
    "square": ("the shape with four corners", "Which shape has four equal sides?", "it has four equal sides"),
    "triangle": ("the shape of a warning sign", "Which shape has exactly three corners?", "it has three corners"),
    "star": ("the shape one sees in the night sky", "Which shape has five points?", "it has five points"),
    "cross": ("the shape that stands for first aid", "Which shape has four equal arms?", "it has four arms"),
    "ring": ("the shape worn on a finger", "Which shape has a hole in the middle?", "it has a hole in the middle"),
}
CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "ring": "圆环",
}  # fmt: skip
PROMPT = "Answer the question using a single word or phrase."
SPLITS = ("val", "testA", "testB")  # one group of held-out scenes each


# ---------------------------------------------------------------------------------------------------------- scenes


@dataclass
class Shape:
    """One drawn shape; `rle` is its visible part, `parts` the polygons [x0, y0, x1, y1, ...] of the whole."""

    colour: str
    kind: str
    x: float
    y: float
    radius: float
    parts: list[list[float]]
    rle: dict
    occluded: bool

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def mask(self) -> np.ndarray:
        """uint8 {0, 1} (H, W): the visible pixels."""
        return coco_mask.decode(self.rle)


@dataclass
class Scene:
    """A photo (JPEG bytes) and its shapes from back to front; `id` is unique over all scenes."""

    id: int
    height: int
    width: int
    jpeg: bytes
    shapes: list[Shape]
    simple: bool = False  # one expression a shape

    @property
    def coco_name(self) -> str:
        return f"COCO_train2014_{self.id:012d}.jpg"


def draw_scene(scene_id: int, *, seed: int, size: int, simple: bool = False) -> Scene:
    """Draw scene `scene_id` with its own generator; the longer side has `size` pixels, the ratio is 4:3 to 3:4.

    `simple`: three shapes of different colours, of the first three KINDS.
    """
    rng = np.random.default_rng([seed, scene_id])
    sides = [(size, size), (size * 3 // 4, size), (size, size * 3 // 4)]
    height, width = sides[rng.integers(3)]
    shapes, masks = place_shapes(rng, height, width, simple)
    photo = background(rng, height, width)
    for shape, mask in zip(shapes, masks):
        paint(rng, photo, mask, COLOURS[shape.colour])
    photo += 5 * rng.standard_normal((height, width, 1), dtype=np.float32)  # grain
    return Scene(scene_id, height, width, to_jpeg(photo), shapes, simple)


def place_shapes(rng: np.random.Generator, height: int, width: int, simple: bool) -> tuple[list[Shape], np.ndarray]:
    """Two to four shapes, no two alike, each at least 60% visible, and their whole masks uint8 (N, H, W)."""
    if simple:
        count = 3
        colours = rng.choice(list(COLOURS), count, replace=False)
        pairs = [(str(colour), KINDS[i]) for colour, i in zip(colours, rng.integers(3, size=count))]
    else:
        count = rng.choice([2, 3, 3, 3, 4])
        pairs = [PAIRS[i] for i in rng.choice(len(PAIRS), count, replace=False)]
    while True:
        radii = rng.uniform(0.15, 0.28, count) * min(height, width)
        centres = rng.uniform(radii[:, None] * 1.1, np.array([[width, height]]) - radii[:, None] * 1.1)
        parts = [outline(rng, kind, *centre, radius) for (_, kind), centre, radius in zip(pairs, centres, radii)]
        rles = [coco_mask.merge(coco_mask.frPyObjects(part, height, width)) for part in parts]
        masks = coco_mask.decode(rles).transpose(2, 0, 1)
        front = np.cumsum(masks[::-1], axis=0)[::-1] - masks  # how many shapes lie over a pixel of each
        visible = masks & (front == 0)
        if (visible.sum((1, 2)) >= 0.6 * masks.sum((1, 2))).all():
            break
    shapes = [
        Shape(
            *pair,
            *centre.tolist(),
            float(radius),
            part,
            coco_mask.encode(np.asfortranarray(seen)),
            occluded=bool((seen != mask).any()),
        )
        for pair, centre, radius, part, seen, mask in zip(pairs, centres, radii, parts, visible, masks)
    ]
    return shapes, masks


def outline(rng: np.random.Generator, kind: str, x: float, y: float, radius: float) -> list[list[float]]:
    """Polygons of a slightly turned shape within `radius`: two overlapping bars for a cross, else one."""

    def polar(n: int, radii: float | list[float], start: float) -> np.ndarray:
        angle = start + np.arange(n) * 2 * np.pi / n
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.resize(radii, n)[:, None]

    def bar(long: float, wide: float) -> np.ndarray:
        return np.array([[-long, -wide], [long, -wide], [long, wide], [-long, wide]])

    up = -np.pi / 2  # y grows downwards
    if kind == "ring":
        outer, inner = polar(40, 1.0, 0), polar(40, 0.55, 0)
        parts = [np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])]  # round, in through a slit, and back
    elif kind == "cross":
        parts = [bar(1.05, 0.36), bar(0.36, 1.05)]
    else:
        parts = [
            {
                "circle": partial(polar, 40, 1.0, 0),
                "square": partial(polar, 4, 1.1, np.pi / 4),
                "triangle": partial(polar, 3, 1.2, up),
                "star": partial(polar, 10, [1.2, 0.5], up),
            }[kind]()
        ]
    turn = rng.uniform(-0.25, 0.25)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return [np.round(part @ rotation * radius / 1.2 + (x, y), 2).ravel().tolist() for part in parts]


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 (H, W, 3) RGB: a muted gradient with blotches."""

    def noise(rows: int, cols: int, channels: int) -> np.ndarray:
        coarse = rng.standard_normal((rows, cols, channels), dtype=np.float32)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)

    tone = rng.uniform(70, 190) + rng.uniform(-15, 15, 3).astype(np.float32)
    return tone + 14 * noise(3, 3, 3) + 9 * noise(height // 12, width // 12, 1)


def paint(rng: np.random.Generator, photo: np.ndarray, mask: np.ndarray, rgb: tuple[int, int, int]) -> None:
    """Lay a shaded colour over `photo` where `mask` is 1, with a soft edge; in place."""
    alpha = cv2.GaussianBlur(mask.astype(np.float32), (3, 3), 0)[..., None]
    shade = np.linspace(1.12, 0.88, len(mask), dtype=np.float32)[:, None, None]
    colour = np.asarray(rgb, np.float32) * shade + rng.uniform(-12, 12, 3).astype(np.float32)
    photo += alpha * (colour - photo)


def to_jpeg(photo: np.ndarray) -> bytes:
    bgr = np.clip(photo, 0, 255).astype(np.uint8)[..., ::-1]
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()


def with_text(scene: Scene, text: str) -> bytes:
    """The scene's JPEG with a line of text on a white band at its foot."""
    photo = cv2.imdecode(np.frombuffer(scene.jpeg, np.uint8), cv2.IMREAD_COLOR)
    band = scene.height // 8
    photo[-band:] = 255
    cv2.putText(photo, text, (4, scene.height - band // 4), cv2.FONT_HERSHEY_SIMPLEX, band / 34, (0, 0, 0), 1)
    return to_jpeg(photo[..., ::-1])


# ----------------------------------------------------------------------------------------------------------- words


def a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def extremes(scene: Scene, shape: Shape, rivals: list[Shape]) -> tuple[list[str], list[str]]:
    """Size words and place words that single out `shape` among `rivals` by a clear margin."""
    margin = 0.12 * max(scene.height, scene.width)
    place = [
        word
        for word, gaps in {
            "leftmost": [other.x - shape.x for other in rivals],
            "rightmost": [shape.x - other.x for other in rivals],
            "top": [other.y - shape.y for other in rivals],
            "bottom": [shape.y - other.y for other in rivals],
        }.items()
        if rivals and min(gaps) > margin
    ]
    size = [
        word
        for word, ratios in {
            "largest": [shape.radius / other.radius for other in rivals],
            "smallest": [other.radius / shape.radius for other in rivals],
        }.items()
        if rivals and min(ratios) > 1.2
    ]
    return size, place


def phrases(scene: Scene, shape: Shape) -> tuple[list[str], list[str]]:
    """Unambiguous expressions by look (the first is colour + kind) and by place."""
    if scene.simple:
        return [shape.name], []
    others = [other for other in scene.shapes if other is not shape]
    alike = [other for other in others if other.kind == shape.kind]
    size, place = extremes(scene, shape, others)
    look = [shape.name]
    if not alike:
        look.append(shape.kind)
    if shape.colour not in {other.colour for other in others}:
        look.append(f"{shape.colour} shape")
    look += [f"{word} shape" for word in size]
    spots = [f"{word} shape" for word in place]
    size, place = extremes(scene, shape, alike)
    look += [f"{word} {shape.kind}" for word in size]
    spots += [f"{word} {shape.kind}" for word in place]
    return look, spots


def sentence(rng: np.random.Generator, scene: Scene, shape: Shape) -> str:
    """A long RefCOCOg-like description."""
    other = scene.shapes[rng.choice([i for i, s in enumerate(scene.shapes) if s is not shape])]
    size, place = extremes(scene, shape, [other])
    spots = {"leftmost": "to the left of", "rightmost": "to the right of", "top": "above", "bottom": "below"}
    relations = [f"{spots[word]} the {other.name}" for word in place]
    relations += [
        f"that is {word} than the {other.name}"
        for word in (w.replace("largest", "larger").replace("smallest", "smaller") for w in size)
    ]
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


# ----------------------------------------------------------------------------------------------------------- files


def write(path: Path, content: bytes | str | list | dict) -> None:
    """Write bytes or text as they are, anything else as JSON; makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")


def write_png(path: Path, labels: np.ndarray) -> None:
    write(path, cv2.imencode(".png", labels)[1].tobytes())


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def annotation(shape: Shape, ann_id: int, image_id: int, mask: np.ndarray | None = None, **fields) -> dict:
    """A COCO annotation of the shape, or of `mask`, a part of it.

    A shape in full view is a list of polygons (two for a cross); what is partly hidden, has a hole or is a part is an
    RLE, in turns compressed and uncompressed. All of them decode to exactly the drawn pixels.
    """
    rle = shape.rle if mask is None else coco_mask.encode(np.asfortranarray(mask))
    if mask is None and not shape.occluded and shape.kind != "ring":
        segmentation = shape.parts
    elif ann_id % 2:
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    else:
        segmentation = {"size": list(rle["size"]), "counts": run_lengths(coco_mask.decode(rle))}
    return {
        "id": ann_id, "image_id": image_id, "category_id": CATEGORY[shape.kind], "iscrowd": 0,
        "area": int(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist(), "segmentation": segmentation,
    } | fields  # fmt: skip


def run_lengths(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE of a mask: column-major run lengths, the first of them of zeros."""
    pixels = np.concatenate([[0], mask.ravel(order="F"), [2]])
    return np.diff(np.flatnonzero(np.diff(pixels)), prepend=0).tolist()


def image_entry(scene: Scene, file_name: str) -> dict:
    return {"id": scene.id, "file_name": file_name, "height": scene.height, "width": scene.width}


def categories() -> list[dict]:
    return [{"supercategory": "shape", "id": i, "name": kind} for kind, i in CATEGORY.items()]


# --------------------------------------------------------------------------------------------------- referring sets


class Referring:
    """Collects the refs of one referring set; ids of sentences and refs count up."""

    def __init__(self, first_id: int):
        self.refs, self.next_sentence = [], first_id

    def add(self, scene: Scene, split: str, shapes: list[Shape], texts: list[str], *, generalised: bool = False):
        sentences = []
        for text in texts:
            plain = text.lower().rstrip(".")
            sentences.append({"tokens": plain.split(), "raw": text, "sent_id": self.next_sentence, "sent": plain})
            self.next_sentence += 1
        ann_ids = [annotation_id(scene, shape) for shape in shapes]
        classes = [CATEGORY[shape.kind] for shape in shapes]
        ref = {
            "sent_ids": [entry["sent_id"] for entry in sentences],
            "file_name": scene.coco_name,
            "ref_id": len(self.refs) + 1,
            "image_id": scene.id,
            "split": split,
            "sentences": sentences,
        }
        if generalised:
            ref |= {"ann_id": ann_ids or [-1], "category_id": classes or [-1], "no_target": not shapes}
        else:
            (ref["ann_id"],), (ref["category_id"],) = ann_ids, classes
            ref["file_name"] = ref["file_name"].replace(".jpg", f"_{ref['ann_id']}.jpg")
        self.refs.append(ref)


def annotation_id(scene: Scene, shape: Shape) -> int:
    return scene.id * 10 + next(i for i, other in enumerate(scene.shapes) if other is shape)


def write_referring(root: Path, groups: dict[str, list[Scene]], seed: int) -> None:
    """refcoco, refcoco+, refcocog, grefcoco, refclef: two expressions a shape in every set but grefcoco.

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
    write(root / "refcoco/refs(unc).p", pickle.dumps(sets["refcoco"].refs, protocol=2))
    write(root / "refcoco+/refs(unc).p", pickle.dumps(sets["refcoco+"].refs, protocol=2))
    write(root / "refcocog/refs(umd).p", pickle.dumps(sets["refcocog"].refs, protocol=2))
    write(root / "grefcoco/grefs(unc).json", sets["grefcoco"].refs)


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
                refs.refs[-1]["file_name"] = f"{scene.id}_{annotation_id(scene, shape)}.jpg"
    write(root / "refclef/instances.json", {"images": images, "annotations": annotations, "categories": categories()})
    write(root / "refclef/refs(unc).p", pickle.dumps(refs.refs, protocol=2))


def share(items: list, parts: int) -> list:
    """The first of `parts` equal shares, two items at least."""
    return items[: max(2, len(items) // parts)]


# ---------------------------------------------------------------------------------------------------- semantic sets


def label_map(scene: Scene, classes: dict[str, int], attribute: str, outline: int) -> np.ndarray:
    """uint8 (H, W): the class of every pixel by the shapes' kind or colour, `outline` on their edges."""
    labels = np.full((scene.height, scene.width), classes["background"], np.uint8)
    edges = np.zeros_like(labels)
    for shape in scene.shapes:
        labels[shape.mask > 0] = classes[getattr(shape, attribute)]
        edges |= cv2.morphologyEx(shape.mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
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
    labels = [
        {
            "name": f"object--paint--{colour}",
            "readable": f"{colour.title()} Paint",
            "color": list(rgb),
            "evaluate": True,
            "instances": False,
        }
        for colour, rgb in COLOURS.items()
    ]
    labels.append(
        {
            "name": "construction--barrier--wall",
            "readable": "Wall",
            "color": [128, 128, 128],
            "evaluate": True,
            "instances": False,
        }
    )
    write(root / "mapillary/config_v2.0.json", {"version": "2.0", "labels": labels})


def write_parts(root: Path, scenes: list[Scene]) -> None:
    """paco_lvis (whole shapes, upper and lower halves) and pascal_part (left and right halves), 1/16 of the scenes."""
    paco = {"images": [], "annotations": [], "categories": []}
    pascal = {"images": [], "annotations": [], "categories": []}
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
            mask, kind = shape.mask, KINDS.index(shape.kind)
            upper, left = np.zeros_like(mask), np.zeros_like(mask)
            upper[: round(shape.y)], left[:, : round(shape.x)] = 1, 1
            for i, part in enumerate((None, mask & upper, mask & ~upper & 1)):
                ann_id = len(paco["annotations"]) + 1
                whole = ann_id - i
                paco["annotations"].append(
                    annotation(
                        shape,
                        ann_id,
                        scene.id,
                        part,
                        category_id=3 * kind + 1 + i,
                        obj_ann_id=whole,
                        attribute_ids=[],
                        dom_color_ids=[],
                    )
                )
            for i, part in enumerate((mask & left, mask & ~left & 1)):
                ann_id = len(pascal["annotations"]) + 1
                pascal["annotations"].append(annotation(shape, ann_id, scene.id, part, category_id=2 * kind + 1 + i))
    write(root / "vlpart/paco/annotations/paco_lvis_v1_train.json", paco)
    write(root / "vlpart/pascal_part/train.json", pascal)


# -------------------------------------------------------------------------------------------- reasoning, conversation


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
                explained.append(
                    {
                        "query": question,
                        "outputs": f"The {kind} is meant, because {reason}.",
                        "image": f"{name}.jpg",
                        "json": f"{name}.json",
                    }
                )
    write(root / "explanatory/train.json", explained)


def labelme(image: str, label: str, part: list[float]) -> dict:
    return {
        "label": label, "labels": [label], "shape_type": "polygon", "image_name": image,
        "points": np.reshape(part, (-1, 2)).tolist(), "group_id": None, "group_ids": [None], "flags": {},
    }  # fmt: skip


def write_conversations(root: Path, scenes: list[Scene], seed: int) -> None:
    """LLaVA-Instruct: two or more turns about coco/train2017 photos; `<image>` first or last in its turn."""
    records = []
    for i, scene in enumerate(share(scenes, 8)):
        rng = np.random.default_rng([seed, scene.id, 4])
        names = [a(shape.name) for shape in scene.shapes]
        opening = "Describe this picture."
        turns = [
            f"<image>\n{opening}" if i % 2 else f"{opening}\n<image>",
            f"This picture shows {', '.join(names[:-1])} and {names[-1]}.",
        ]
        for question, answer, _ in facts(rng, scene)[:2]:
            turns += [question, f"{answer.capitalize()}."]
        file_name = f"{scene.id:012d}.jpg"
        write(root / "coco/train2017" / file_name, scene.jpeg)
        conversation = [{"from": ("human", "gpt")[j % 2], "value": text} for j, text in enumerate(turns)]
        records.append({"id": file_name.removesuffix(".jpg"), "image": file_name, "conversations": conversation})
    write(root / "llava_dataset/llava_instruct_150k.json", records)


# ------------------------------------------------------------------------------------------------------------- VQA


def write_vqa(root: Path, train: list[Scene], val: list[Scene], seed: int) -> None:
    """vqav2, okvqa, textvqa, vizwiz and gqa for training, all eleven benchmarks for evaluation, below `data/`."""
    for split, scenes in (("train", share(train, 8)), ("val", share(val, 4))):
        for name in ("vqav2", "okvqa", "textvqa", "vizwiz"):
            write_open_ended(root, name, split, scenes, seed)
        write_gqa(root / "gqa", split, scenes, seed)
    scenes = share(val, 4)
    write_pope(root / "pope", scenes, seed)
    write_mme(root / "mme", scenes, seed)
    write_mmbench(root / "mmbench", scenes, seed)


def write_open_ended(root: Path, name: str, split: str, scenes: list[Scene], seed: int) -> None:
    """One of the four sets with ten answers a question: photos, jsonl, questions and annotations."""
    folder = {
        "vqav2": f"{split}2014", "okvqa": f"{split}2014", "textvqa": "train_images", "vizwiz": split,
    }[name]  # fmt: skip
    stem = {
        "vqav2": ("v2_OpenEnded_mscoco_{}2014_questions", "v2_mscoco_{}2014_annotations"),
        "okvqa": ("OpenEnded_mscoco_{}2014_questions", "mscoco_{}2014_annotations"),
        "textvqa": ("textvqa_{}_questions", "textvqa_{}_annotations"),
        "vizwiz": ("vizwiz_{}_questions", "vizwiz_{}_annotations"),
    }[name]
    lines, questions, annotations = [], [], []
    for i, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, scene.id, 5])
        jpeg, image_id, file_name = scene.jpeg, scene.id, f"COCO_{split}2014_{scene.id:012d}.jpg"
        shape = scene.shapes[-1]
        if name == "vqav2":
            rows = facts(rng, scene)[:2]
        elif name == "okvqa":
            phrase = RIDDLES[shape.kind][0]
            rows = [(f"Which kind is {phrase}?", shape.kind, "other")]
        elif name == "textvqa":
            number = str(rng.integers(100, 1000))
            image_id = f"{scene.id:016x}"
            jpeg, file_name = with_text(scene, number), f"{image_id}.jpg"
            rows = [("what number is written below?", number, "number")]
        else:
            file_name = image_id = f"VizWiz_{split}_{i:08d}.jpg"
            rows = [facts(rng, scene)[0], ("What does this cost?", "unanswerable", "unanswerable")]
        write(root / name / folder / file_name, jpeg)
        for j, (question, answer, answer_type) in enumerate(rows):
            question_id = len(lines) if name == "vizwiz" else scene.id * 1000 + j
            # Two of ten people disagree, as people do.
            texts = [answer] * 8 + ["not sure"] * 2
            answers = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts, 1)]
            key = {"image_id": image_id, "question_id": question_id}
            lines.append(
                {
                    "image": f"data/{name}/{folder}/{file_name}",
                    "question": question,
                    "question_id": question_id,
                    "answer": answer,
                }
            )
            questions.append(key | {"question": question})
            annotations.append(key | {
                "question_type": " ".join(question.lower().split()[:2]), "answer_type": answer_type,
                "multiple_choice_answer": answer, "answers": answers,
            })  # fmt: skip
    header = {
        "info": {"description": "synthetic shapes"},
        "license": {},
        "data_type": "mscoco",
        "data_subtype": f"{split}2014",
    }
    write(root / name / f"{name}_{split}.jsonl", jsonl(lines))
    write(root / name / f"{stem[0].format(split)}.json", header | {"task_type": "Open-Ended", "questions": questions})
    write(root / name / f"{stem[1].format(split)}.json", header | {"annotations": annotations})


def write_gqa(root: Path, split: str, scenes: list[Scene], seed: int) -> None:
    """GQA: train_balanced, or testdev_balanced under the names that evaluators look for."""
    lines, questions = [], {}
    for scene in scenes:
        rng = np.random.default_rng([seed, scene.id, 6])
        write(root / f"images/n{scene.id}.jpg", scene.jpeg)
        for j, (question, answer, kind) in enumerate(facts(rng, scene)[:2]):
            question_id = str(20_000_000 + scene.id * 10 + j)
            lines.append(
                {
                    "image": f"data/gqa/images/n{scene.id}.jpg",
                    "question": question,
                    "question_id": question_id,
                    "answer": answer,
                }
            )
            questions[question_id] = {
                "question": question, "answer": answer, "fullAnswer": f"{answer}.", "imageId": f"n{scene.id}",
                "isBalanced": True, "types": {"structural": "verify" if kind == "yes/no" else "query",
                                              "semantic": "attr", "detailed": "attr"},
                "groups": {"global": None, "local": question_id}, "semantic": [], "semanticStr": "", "entailed": [],
                "equivalent": [question_id], "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
            }  # fmt: skip
    if split == "train":
        write(root / "train_balanced.jsonl", jsonl(lines))
        write(root / "train_balanced_questions.json", questions)
        return
    for name in ("llava_gqa_testdev_balanced_qwen_format", "testdev_balanced"):
        write(root / f"{name}.jsonl", jsonl(lines))
    for name in ("testdev_balanced_questions", "testdev_balanced_all_questions"):
        write(root / f"{name}.json", questions)


def write_pope(root: Path, scenes: list[Scene], seed: int) -> None:
    """POPE: per scene and category one question with yes and one with no (adversarial: a colour that is there)."""
    lines = []
    for category in ("random", "popular", "adversarial"):
        labels = []
        for scene in scenes:
            rng = np.random.default_rng([seed, scene.id, 7])
            colour = {"random": None, "popular": "red", "adversarial": scene.shapes[0].colour}[category]
            image = f"COCO_val2014_{scene.id:012d}.jpg"
            write(root / "val2014" / image, scene.jpeg)
            for name, label in ((scene.shapes[0].name, "yes"), (" ".join(absent(rng, scene, colour=colour)), "no")):
                question = f"Is there {a(name)} in the image?"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": question, "label": label})
                lines.append(
                    {"question_id": len(lines), "image": image, "text": f"{question}\n{PROMPT}", "category": category}
                )
        write(root / f"coco/coco_pope_{category}.json", jsonl(labels))
    write(root / "llava_pope_test.jsonl", jsonl(lines))


def write_mme(root: Path, scenes: list[Scene], seed: int) -> None:
    """MME: fourteen tables, two questions a photo, yes then no."""
    tables = (
        "existence count position color posters celebrity scene landmark artwork OCR commonsense_reasoning "
        "numerical_calculation text_translation code_reasoning"
    ).split()
    for table in tables:
        rows = []
        for scene in scenes:
            rng = np.random.default_rng([seed, scene.id, 8])
            file_name, jpeg, shape, n = f"{scene.id:012d}.jpg", scene.jpeg, scene.shapes[-1], len(scene.shapes)
            left, *_, right = sorted(scene.shapes, key=lambda s: s.x)
            wrong = " ".join(absent(rng, scene))
            code = str(rng.integers(10, 90))
            right_text, wrong_text, ask = {
                "existence": (a(shape.name), a(wrong), "Is there {} in this image?"),
                "count": (f"{n} shapes", f"{n + 2} shapes", "Are there a total of {} in the image?"),
                "position": ("left", "right", f"Is the {left.name} on the {{}} side of the {right.name}?"),
                "OCR": (code, code[::-1] + "1", 'Is the number in the image "{}"?'),
                "numerical_calculation": (str(int(code) + 2), code, "Is the answer to the arithmetic question {}?"),
                "text_translation": (code, code + "0", "Is it right to translate the text in the image into {}?"),
                "code_reasoning": (code, code + "5", "The image shows a python code. Does it print {}?"),
                "scene": ("shapes on a wall", "a beach", "Is this picture captured in a place of {}?"),
            }.get(table, (a(shape.name), a(wrong), "Does this image show {}?"))
            text = {
                "OCR": code,
                "numerical_calculation": f"{code} + 2 =",
                "text_translation": code,
                "code_reasoning": f"print({code})",
            }.get(table)
            if text:
                jpeg = with_text(scene, text)
            pair = [
                f"{ask.format(answer)} Please answer yes or no.\t{label}"
                for answer, label in ((right_text, "Yes"), (wrong_text, "No"))
            ]
            folder = root / "MME_Benchmark_release_version" / table
            write(folder / file_name, jpeg)
            write(folder / file_name.replace(".jpg", ".txt"), "".join(f"{line}\n" for line in pair))
            rows += [f"{file_name}\t{line}\n" for line in pair]
        write(root / f"Your_Results/{table}.txt", "".join(rows))


def write_mmbench(root: Path, scenes: list[Scene], seed: int) -> None:
    """MMBench: dev and test, English and Chinese, every question once a rotation of its four options."""
    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    for name, chinese, test in (
        ("dev_20230712", False, False),
        ("dev_cn_20231003", True, False),
        ("test_en_20231003", False, True),
        ("test_cn_20231003", True, True),
    ):
        kept = [column for column in columns if not (test and column == "answer")]
        lines = ["\t".join(kept)]
        for i, scene in enumerate(scenes):
            rng = np.random.default_rng([seed, scene.id, 9])
            options = [scene.shapes[-1].name]
            while len(options) < 4:
                options += {" ".join(absent(rng, scene))} - set(options)
            start = int(rng.integers(4))
            for k in range(4):
                order = [options[(j + k + start) % 4] for j in range(4)]
                question = "Which of these is in the image?"
                if chinese:
                    question = "图中有下面哪一个？"
                    order = ["".join(CHINESE[word] for word in option.split()) for option in order]
                row = {
                    "index": 1 + i + k * 1_000_000, "question": question, "hint": "", **dict(zip("ABCD", order)),
                    "answer": "ABCD"[-(k + start) % 4], "category": "object_localization",
                    "image": base64.b64encode(scene.jpeg).decode(), "source": "shapes",
                    "l2-category": "finegrained_perception (instance-level)", "comment": "",
                    "split": "test" if test else "dev",
                }  # fmt: skip
                lines.append("\t".join(str(row[column]) for column in kept))
        write(root / f"mmbench_{name}.tsv", "\n".join(lines) + "\n")


# ----------------------------------------------------------------------------------------------------------- main


def make_shapes_dataset(
    path: str | Path,
    *,
    train: int = 2000,
    val: int = 100,
    size: int = 224,
    simple: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write the tree below `path` and return it: `train` training scenes, three times `val` held-out scenes.

    `size`: pixels of a photo's longer side. `simple`: scenes whose colours tell the shapes apart, and one expression
    a shape, colour and kind: what a model of a million parameters learns in minutes. Raises ValueError when there are
    too few scenes or pixels.
    """
    if train < 2 or val < 2:
        raise ValueError(f"--train {train} --val {val}: every set needs two scenes at least")
    if size < 48:
        raise ValueError(f"--size {size}: shapes of a few pixels cannot be told apart, use 48 or more")
    root = Path(path)
    counts = {"train": train} | dict.fromkeys(SPLITS, val)
    groups = {split: [] for split in counts}
    splits = [split for split, n in counts.items() for _ in range(n)]
    for scene_id, split in enumerate(tqdm(splits, desc="scenes", mininterval=1, disable=not progress), start=1):
        groups[split].append(draw_scene(scene_id, seed=seed, size=size, simple=simple))
    dataset = root / "dataset"
    write_referring(dataset / "refer_seg", groups, seed)
    write_semantic(dataset, groups["train"])
    write_parts(dataset, groups["train"])
    write_reasoning(dataset / "reason_seg/ReasonSeg", groups, seed)
    write_conversations(dataset, groups["train"], seed)
    write_vqa(root / "data", groups["train"], groups["val"], seed)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="OUTPUT", help="folder that will hold dataset/ and data/")
    parser.add_argument("--train", type=int, default=2000, help="training scenes")
    parser.add_argument("--val", type=int, default=100, help="scenes in each of the three held-out groups")
    parser.add_argument("--size", type=int, default=224, help="pixels of a photo's longer side")
    parser.add_argument("--simple", action="store_true", help="three colours a scene, one expression a shape")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        print(make_shapes_dataset(**vars(args), progress=True))
    except ValueError as error:
        parser.error(str(error))
    return 0
