"""Pictures of masks: overlays, captioned panels, contact sheets, and the worst predictions of an evaluation first.

Everything takes and returns RGB `PIL.Image`s; masks are (H, W) or (n, H, W) at the size of the upright photo.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from self1e.model.photos import Photo, photo_of

Color = tuple[int, int, int]

# Okabe and Ito's palette, which colour-blind readers tell apart too; black left out.
PALETTE: tuple[Color, ...] = (
    (0, 158, 115),
    (230, 159, 0),
    (0, 114, 178),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
)
GROUND_TRUTH, PREDICTION, IGNORED = PALETTE[0], PALETTE[4], (200, 200, 205)
DARKENED = 0.4  # brightness of what lies outside of all masks
INK, PAPER, MUTED = (24, 24, 27), (255, 255, 255), (105, 105, 112)


def overlay(image: Photo, masks: np.ndarray, colors: Sequence[Color] | None = None) -> Image.Image:
    """Outline masks on a photo and darken what is in none of them; what they hold keeps its own colours.

    An outline lies outside of its mask, a later one on top. Without any foreground the photo stays as it is.

    Args:
        image: a path, a PIL image or a uint8 array (H, W, 3); EXIF orientation is applied.
        masks: bool or uint8, (H, W) or (n, H, W); 1 is foreground, 255 (ignored) is painted grey.
        colors: one per mask; default: `PALETTE` in turn.

    Raises ValueError when the sizes differ.
    """
    photo = np.array(photo_of(image))
    masks = np.asarray(masks, dtype=np.uint8)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.shape[1:] != photo.shape[:2]:
        raise ValueError(f"masks are {masks.shape[1:]} (height, width), the photo {photo.shape[:2]}")
    foreground, ignored = (masks == 1).any(0), (masks == 255).any(0)
    if foreground.any():
        dark = (DARKENED * np.arange(256)).astype(np.uint8)  # a table of 256 values, since floats take gigabytes
        photo = np.where(foreground[..., None], photo, dark[photo])
    photo[ignored & ~foreground] = IGNORED
    width = max(1, round(max(photo.shape) / 250))
    for index, mask in enumerate((masks == 1).astype(np.uint8)):
        color = (colors or PALETTE)[index % len(colors or PALETTE)]
        inside = mask.astype(bool)
        own = photo[inside]
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(photo, contours, -1, PAPER, 2 * width + 3, cv2.LINE_AA)
        cv2.drawContours(photo, contours, -1, color, 2 * width + 1, cv2.LINE_AA)
        photo[inside] = own
    return Image.fromarray(photo)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines at most `width` pixels wide, broken at blanks, and inside a word only where it alone is too wide."""
    letters = 1 + round(1.5 * width * len(text) / max(1, font.getlength(text)))  # more than fit into an average line
    lines = textwrap.wrap(text, letters)
    while letters > 1 and any(font.getlength(line) > width for line in lines):
        letters -= 1
        lines = textwrap.wrap(text, letters)
    return lines or [""]


def panel(
    pictures: dict[str, Image.Image], caption: str = "", note: str = "", *, width: int = 1200, margin: int = 16
) -> Image.Image:
    """Pictures side by side at one height, each with its name below it, under a wrapped caption.

    pictures: name -> picture. caption: the sentence. note: a few words at the right of it, such as the IoU.
    width: of the whole panel, pixels; letters are sized for it.
    """
    big, small = (ImageFont.load_default(round(width / part)) for part in (46, 60))
    room = width - margin * (len(pictures) + 1)
    height = min(room / sum(p.width / p.height for p in pictures.values()), 0.75 * width)
    sizes = [(max(1, round(height * p.width / p.height)), max(1, round(height))) for p in pictures.values()]
    tiles = [p.convert("RGB").resize(size, Image.Resampling.LANCZOS) for p, size in zip(pictures.values(), sizes)]
    note_width = round(big.getlength(note)) + margin if note else 0
    lines = _wrap(caption, big, width - 2 * margin - note_width) if caption or note else []
    line = round(width / 34)
    top = margin + line * len(lines) + (margin // 2 if lines else 0)

    canvas = Image.new("RGB", (width, top + tiles[0].height + line + margin // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(lines):
        draw.text((margin, margin + number * line), text, INK, big)
    draw.text((width - margin, margin), note, PREDICTION, big, anchor="ra")
    left = (width - sum(tile.width for tile in tiles) - margin * (len(tiles) - 1)) // 2
    for name, tile in zip(pictures, tiles):
        canvas.paste(tile, (left, top))
        draw.text((left + tile.width // 2, top + tile.height + line // 5), name, MUTED, small, anchor="ma")
        left += tile.width + margin
    return canvas


def compare(
    image: Image.Image, target: np.ndarray, prediction: np.ndarray, sentence: str, iou: float, *, width: int = 1200
) -> Image.Image:
    """Photo, ground truth and prediction of one sentence, with the sentence and the IoU above them."""
    truth = "ground truth" if (target == 1).any() else "ground truth: nothing"
    truth += " (grey: ignored)" if (target == 255).any() else ""
    guess = "prediction" if prediction.any() else "prediction: nothing"
    marked, found = overlay(image, target, [GROUND_TRUTH]), overlay(image, prediction, [PREDICTION])
    return panel({"photo": image, truth: marked, guess: found}, sentence, f"IoU {iou:.2f}", width=width)


def grid(pictures: Sequence[Image.Image], columns: int = 2, *, cell: int = 900, margin: int = 12) -> Image.Image:
    """A contact sheet: pictures scaled to `cell` pixels of width, row by row, each row as high as its highest."""
    cells = [ImageOps.contain(p.convert("RGB"), (cell, 4 * cell)) for p in pictures]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    columns = min(columns, len(cells))
    heights = [max(picture.height for picture in row) for row in rows]
    size = (columns * cell + (columns + 1) * margin, sum(heights) + (len(rows) + 1) * margin)
    canvas, top = Image.new("RGB", size, PAPER), margin
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            canvas.paste(picture, (margin + column * (cell + margin) + (cell - picture.width) // 2, top))
        top += height + margin
    return canvas


def safe_name(text: str, length: int = 80) -> str:
    """The end of `text` as a file name that every file system takes; image suffixes inside it are dropped."""
    text = re.sub(r"\.(jpe?g|png)\b", "", text, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text)[-length:].strip("._-") or "unnamed"


def save_worst_first(
    folder: Path,
    values: Sequence[float],
    names: Sequence[str],
    draw: Callable[[int], Image.Image],
    *,
    label: str = "iou",
    most: int = 200,
    worst: int = 8,
    best: int = 4,
) -> Path:
    """Save `NNNN_<label>X.XX_<name>.jpg` from the lowest value up, and `overview.png` with the worst and a few best.

    values: what the pictures are sorted by, of the kind that `label` names. draw: index -> its picture; called for one
    picture at a time, so memory does not grow with the evaluation.
    most: pictures saved at most. worst, best: pictures on the overview. Pictures of an earlier run are replaced.
    Returns the overview's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"[0-9]*_{label}*.jpg"):
        stale.unlink()
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    for rank, index in enumerate(order[:most], 1):
        path = folder / f"{rank:04d}_{label}{values[index]:.2f}_{safe_name(names[index])}.jpg"
        draw(index).save(path, quality=90)
    chosen = order[:worst] + order[max(worst, len(order) - best) :]
    grid([draw(index) for index in chosen]).save(folder / "overview.png")
    return folder / "overview.png"
