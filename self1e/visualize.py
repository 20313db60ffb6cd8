"""Pictures of masks: overlays, captioned panels, and contact sheets.

Everything takes and returns RGB `PIL.Image`s; masks are (H, W) or (n, H, W) at the size of the upright photo.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from self1e.model.photos import Photo, photo_of

# Okabe and Ito's palette, which colour-blind readers tell apart too; black left out.
PALETTE = ((0, 158, 115), (230, 159, 0), (0, 114, 178), (204, 121, 167), (213, 94, 0), (86, 180, 233), (240, 228, 66))
GROUND_TRUTH, PREDICTION, IGNORED = PALETTE[0], PALETTE[4], (200, 200, 205)
DARKENED = 0.4  # brightness of what lies outside of all masks
INK, PAPER, MUTED = (24, 24, 27), (255, 255, 255), (105, 105, 112)
MARGIN = 16  # pixels between pictures


def overlay(image: Photo, masks: Any, colors: Sequence[tuple[int, int, int]] = PALETTE) -> Image.Image:
    """Outline masks on a photo and darken what is in none of them; what they hold keeps its own colours.

    An outline lies outside of its mask, a later one on top. Without any foreground the photo stays as it is.

    Args:
        image: a path, a PIL image or a uint8 array (H, W, 3); EXIF orientation is applied.
        masks: bool or uint8, (H, W), (n, H, W) or a list; 1 is foreground, 255 (ignored) is painted grey.
        colors: of the masks in turn.

    Raises ValueError when the sizes differ.
    """
    photo = np.array(photo_of(image))
    masks = [masks] if getattr(masks, "ndim", 3) == 2 else masks
    foreground, ignored = np.zeros((2, *photo.shape[:2]), bool)
    for mask in map(np.asarray, masks):  # one by one: photos are large
        if mask.shape != foreground.shape:
            raise ValueError(f"a mask is {mask.shape} (height, width), the photo {foreground.shape}")
        foreground |= mask == 1
        ignored |= mask == 255
    if foreground.any():
        dark = (DARKENED * np.arange(256)).astype(np.uint8)  # a table of 256 values, since floats take gigabytes
        photo = np.where(foreground[..., None], photo, dark[photo])
    photo[ignored & ~foreground] = IGNORED
    width = max(1, round(max(photo.shape) / 250))
    for index, mask in enumerate(masks):
        inside = np.asarray(mask) == 1
        own = photo[inside]
        contours, _ = cv2.findContours(inside.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(photo, contours, -1, PAPER, 2 * width + 3, cv2.LINE_AA)
        cv2.drawContours(photo, contours, -1, colors[index % len(colors)], 2 * width + 1, cv2.LINE_AA)
        photo[inside] = own
    return Image.fromarray(photo)


def panel(pictures: dict[str, Image.Image], caption: str, note: str = "", *, width: int = 1200) -> Image.Image:
    """Pictures side by side at one height, each with its name below it, under a wrapped caption.

    pictures: name -> picture. note: a few words at the right of the caption, such as the IoU.
    width: of the whole panel, pixels; letters are sized for it.
    """
    big, small = (ImageFont.load_default(round(width / part)) for part in (46, 60))
    room = width - MARGIN * (len(pictures) + 1)
    height = min(room / sum(p.width / p.height for p in pictures.values()), 0.75 * width)
    sizes = [(max(1, round(height * p.width / p.height)), max(1, round(height))) for p in pictures.values()]
    tiles = [p.convert("RGB").resize(size, Image.Resampling.LANCZOS) for p, size in zip(pictures.values(), sizes)]
    space = width - 3 * MARGIN - big.getlength(note)
    lines = textwrap.wrap(caption, int(space / max(map(big.getlength, {"m", *caption})))) or [""]
    line = round(width / 34)
    top = MARGIN + line * len(lines) + MARGIN // 2

    canvas = Image.new("RGB", (width, top + tiles[0].height + line + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * line), text, INK, big)
    draw.text((width - MARGIN, MARGIN), note, PREDICTION, big, anchor="ra")
    left = (width - sum(tile.width for tile in tiles) - MARGIN * (len(tiles) - 1)) // 2
    for name, tile in zip(pictures, tiles):
        canvas.paste(tile, (left, top))
        draw.text((left + tile.width // 2, top + tile.height + line // 5), name, MUTED, small, anchor="ma")
        left += tile.width + MARGIN
    return canvas


def grid(pictures: Sequence[Image.Image], columns: int = 2, *, cell: int = 900) -> Image.Image:
    """A contact sheet: pictures scaled to `cell` pixels of width, row by row, each row as high as its highest."""
    cells = [ImageOps.contain(p.convert("RGB"), (cell, 4 * cell)) for p in pictures]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(picture.height for picture in row) + MARGIN for row in rows]
    canvas = Image.new("RGB", (len(rows[0]) * (cell + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            left = MARGIN + column * (cell + MARGIN) + (cell - picture.width) // 2
            canvas.paste(picture, (left, MARGIN + sum(heights[:number])))
    return canvas
