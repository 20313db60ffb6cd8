"""Scenes of the synthetic data: coloured shapes on a photo-like background, and exact masks of what is visible."""

from dataclasses import dataclass

import cv2
import numpy as np
from pycocotools import mask as coco_mask

COLOURS = {  # RGB
    "red": (214, 40, 40), "green": (44, 160, 44), "blue": (38, 84, 214),
    "yellow": (240, 220, 40), "purple": (140, 50, 170), "orange": (245, 130, 20),
}  # fmt: skip
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
CATEGORY = {kind: i for i, kind in enumerate(KINDS, start=1)}
PAIRS = [(colour, kind) for colour in COLOURS for kind in KINDS]


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
    simple: bool = False  # one expression per shape

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
    bgr = np.clip(photo, 0, 255).astype(np.uint8)[..., ::-1]
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
    return Scene(scene_id, height, width, jpeg, shapes, simple)


def place_shapes(rng: np.random.Generator, height: int, width: int, simple: bool) -> tuple[list[Shape], np.ndarray]:
    """Two to four shapes, no two of the same colour and kind, each at least 60% visible.

    Returns the shapes, and their whole masks uint8 (N, H, W).
    """
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
        parts = [outline(rng, kind, x, y, r) for (_, kind), (x, y), r in zip(pairs, centres, radii)]
        rles = [coco_mask.merge(coco_mask.frPyObjects(part, height, width)) for part in parts]
        masks = coco_mask.decode(rles).transpose(2, 0, 1)
        front = np.cumsum(masks[::-1], axis=0)[::-1] - masks  # how many shapes lie over a pixel of each
        visible = masks & (front == 0)
        if (visible.sum((1, 2)) >= 0.6 * masks.sum((1, 2))).all():
            break
    rles, hidden = coco_mask.encode(np.asfortranarray(visible.transpose(1, 2, 0))), (visible != masks).any((1, 2))
    shapes = [
        Shape(colour, kind, float(x), float(y), float(r), part, rle, bool(occluded))
        for (colour, kind), (x, y), r, part, rle, occluded in zip(pairs, centres, radii, parts, rles, hidden)
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
        corners: dict[str, tuple[int, float | list[float], float]] = {
            "circle": (40, 1.0, 0),
            "square": (4, 1.1, np.pi / 4),
            "triangle": (3, 1.2, up),
            "star": (10, [1.2, 0.5], up),
        }
        parts = [polar(*corners[kind])]
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
