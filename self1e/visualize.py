"""Pictures of masks: overlays, captioned panels, contact sheets, and the worst predictions of an evaluation first.

Everything takes and returns RGB `PIL.Image`s; masks are (H, W) or (n, H, W) at the photo's size.
"""

import re
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

Color = tuple[int, int, int]

# Okabe and Ito's palette, told apart by colour-blind readers too; black left out.
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
CLEAR = 448  # pixels of a photo's longer side from which on outlines, three of them wide at least, hide little
INK, PAPER, MUTED = (24, 24, 27), (255, 255, 255), (105, 105, 112)

# Names of fonts, wide coverage first, because sentences can be in any script. Pillow's own font is the last; letters
# that none of them holds are looked for among the fonts that fontconfig knows.
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "arial.ttf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
)
BOXES = "(boxes: letters that no font found here holds; the Noto font of their script would)"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def _fonts(size: int) -> list[Font]:
    """The fonts of `FONTS` that are installed, and Pillow's own."""
    found: list[Font] = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return [*found, ImageFont.load_default(size)]


@cache
def _holds(font: Font, letter: str) -> bool:
    """Whether a font can draw a letter: its picture is not the one of a letter that no font has."""
    pictures = [font.getmask(text) for text in (letter, "\U0010fffe")]
    return pictures[0].size != pictures[1].size or bytes(pictures[0]) != bytes(pictures[1])


@cache
def _font_of(letter: str, size: int) -> list[Font]:
    """The font that fontconfig names for a letter, where it is installed and the font does hold it."""
    command = ["fc-match", "--format=%{file}", f"sans:charset={ord(letter):x}"]
    try:
        file = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        font = ImageFont.truetype(file, size)
    except (OSError, subprocess.SubprocessError):
        return []
    return [font] if _holds(font, letter) else []


def _font(size: int, text: str) -> tuple[Font, bool]:
    """The font that draws most of a text, and whether it draws all of it."""
    letters, fonts = set("".join(text.split())), [*_fonts(size)]
    for letter in sorted(letters):
        if not any(_holds(font, letter) for font in fonts):
            fonts += _font_of(letter, size)
    held = {font: sum(_holds(font, letter) for letter in letters) for font in fonts}
    best = max(held, key=lambda font: held[font])  # the first of equals
    return best, held[best] == len(letters)


def enlarge(image: Image.Image) -> Image.Image:
    """A photo times the smallest whole number that makes its longer side at least `CLEAR` pixels."""
    times = -(-CLEAR // max(image.size))
    return image if times == 1 else image.resize((times * image.width, times * image.height), Image.Resampling.BICUBIC)


def overlay(
    image: Image.Image,
    masks: np.ndarray,
    colors: Sequence[Color] | None = None,
    alpha: float = 0.5,
    *,
    enlarged: bool = False,
) -> Image.Image:
    """Paint masks on a photo, each in its colour with an outline; later masks lie on top.

    masks: bool or uint8, (H, W) or (n, H, W) at the photo's size; 1 is foreground, 255 (ignored) is painted grey.
    colors: one a mask, `PALETTE` in turn by default. alpha: opacity of the filling, 0..1.
    enlarged: draw on a photo made larger by `enlarge`, where outlines hide little.
    Raises ValueError when the sizes differ.
    """
    import cv2  # drawing is all that needs it, and command lines import this module

    masks = np.asarray(masks, dtype=np.uint8)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.shape[1:] != (image.height, image.width):
        raise ValueError(f"masks are {masks.shape[1:]} (height, width), the photo {(image.height, image.width)}")
    if enlarged:
        image = enlarge(image)
        times = image.width // masks.shape[2]
        masks = masks.repeat(times, axis=1).repeat(times, axis=2)
    picture = np.array(image.convert("RGB"))
    width = max(1, round(max(image.size) / 300))
    for index, mask in enumerate(masks):
        color = (colors or PALETTE)[index % len(colors or PALETTE)]
        for area, paint in ((mask == 255, IGNORED), (mask == 1, color)):
            for channel, value in enumerate(paint):  # a table of 256 values: one of every pixel takes gigabytes
                mixed = ((1 - alpha) * np.arange(256) + alpha * value).round().astype(np.uint8)
                plane = picture[..., channel]
                plane[area] = mixed[plane[area]]
        contours, _ = cv2.findContours((mask == 1).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, PAPER, width + 2, cv2.LINE_AA)
        cv2.drawContours(picture, contours, -1, color, width, cv2.LINE_AA)
    return Image.fromarray(picture)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines at most `width` pixels wide, broken at blanks, and inside a word only where it alone is too wide."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def panel(
    pictures: dict[str, Image.Image], caption: str = "", note: str = "", *, width: int = 1200, margin: int = 16
) -> Image.Image:
    """Pictures side by side at one height, each with its name below it, under a wrapped caption.

    pictures: name -> picture. caption: the sentence, any script. note: a few words set apart from it (the IoU).
    width: of the whole panel, pixels; letters are sized for it.
    """
    large, little = round(width / 46), round(width / 60)
    (big, drawn), (small, _) = _font(large, caption + note), _font(little, "".join(pictures))
    room = width - margin * (len(pictures) + 1)
    height = min(room / sum(p.width / p.height for p in pictures.values()), 0.75 * width)
    sizes = [(max(1, round(height * p.width / p.height)), max(1, round(height))) for p in pictures.values()]
    tiles = [p.convert("RGB").resize(size, Image.Resampling.LANCZOS) for p, size in zip(pictures.values(), sizes)]
    note_width = round(big.getlength(note)) + margin if note else 0
    lines = _wrap(caption, big, width - 2 * margin - note_width) if caption or note else []
    lines += [] if drawn else [BOXES]
    line = round(1.35 * large)
    top = margin + line * len(lines) + (margin // 2 if lines else 0)

    canvas = Image.new("RGB", (width, top + tiles[0].height + round(1.6 * little) + margin // 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(lines):
        draw.text((margin, margin + number * line), text, INK, big)
    draw.text((width - margin, margin), note, PREDICTION, big, anchor="ra")
    left = (width - sum(tile.width for tile in tiles) - margin * (len(tiles) - 1)) // 2
    for name, tile in zip(pictures, tiles):
        canvas.paste(tile, (left, top))
        draw.text((left + tile.width // 2, top + tile.height + 0.3 * little), name, MUTED, small, anchor="ma")
        left += tile.width + margin
    return canvas


def compare(
    image: Image.Image, target: np.ndarray, prediction: np.ndarray, sentence: str, iou: float, *, width: int = 1200
) -> Image.Image:
    """Photo, ground truth and prediction of one sentence, with the sentence and the IoU above them."""
    truth = "ground truth" if (target == 1).any() else "ground truth: nothing"
    truth += " (grey: ignored)" if (target == 255).any() else ""
    guess = "prediction" if prediction.any() else "prediction: nothing"
    marked = overlay(image, target, [GROUND_TRUTH], enlarged=True)
    found = overlay(image, prediction, [PREDICTION], enlarged=True)
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
            left = margin + column * (cell + margin) + (cell - picture.width) // 2
            canvas.paste(picture, (left, top))
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
    for place, index in enumerate(order[:most], 1):
        path = folder / f"{place:04d}_{label}{values[index]:.2f}_{safe_name(names[index])}.jpg"
        draw(index).save(path, quality=90)
    shown = order[:worst] + order[max(worst, len(order) - best) :]
    grid([draw(index) for index in shown]).save(folder / "overview.png")
    return folder / "overview.png"
