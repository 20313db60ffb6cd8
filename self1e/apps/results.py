"""What segment, chat and the demo write: masks, overlays, logits, and the records that name them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from self1e.data.masks import encode_mask
from self1e.files import replacing, write_json
from self1e.visualize import overlay

if TYPE_CHECKING:
    from self1e.model.inference import Reply

SAVE_EVERY = 30  # seconds between two writings of the records


class Names:
    """File names that no two results share, also where the file system ignores case."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def claim(self, *parts: str) -> str:
        """Parts joined by `_`, unsafe characters replaced, cut to what file systems take; numbered when taken."""
        words = [re.sub(r"[^\w.-]+", "_", part).strip("._") for part in parts]
        text = "_".join(word for word in words if word)
        text = text.encode()[:180].decode(errors="ignore")
        name, number = text, 2
        while name.casefold() in self.taken:
            name, number = f"{text}-{number}", number + 1
        self.taken.add(name.casefold())
        return name


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A name for each picture: its stem, with the number of its turn where several share it."""
    names = Names()
    return [names.claim(path.stem or "picture") for path in paths]


def describe(mask: np.ndarray, score: float | None) -> dict:
    """COCO's fields of a mask, bool (H, W); `counts` is text, so that it fits into JSON."""
    rle = encode_mask(mask)
    return {
        "segmentation": rle,
        "bbox": coco.toBbox(rle).tolist(),
        "area": int(mask.sum()),
        "score": 0.0 if score is None else score,
    }


class Results:
    """Writes masks, overlays and logits as they come, and their records; nothing appears half written.

    `predictions.json` has one entry per mask, in COCO's result format; with `answers`, `answers.json` has one entry
    per picture and prompt. image_id and category_id count pictures and prompts from 1.
    """

    def __init__(self, folder: Path, *, save_logits: bool = False, answers: bool = False):
        self.folder, self.save_logits = folder, save_logits
        self.records: list[dict] = []
        self.answers: list[dict] | None = [] if answers else None
        self.names, self.saved = Names(), 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self, path: Path, name: str, image: Image.Image, *, place: tuple[int, int], prompt: str, reply: Reply,
        seconds: float,
    ) -> None:  # fmt: skip
        """Files and records of one reply; `place`: the number of the picture and of the prompt, from 0."""
        picture, turn = place
        record = {"image_id": picture + 1, "category_id": turn + 1, "image": str(path)}
        record |= {"width": image.width, "height": image.height}
        record |= {"prompt": prompt, "text": reply.text, "seconds": round(seconds, 4)}
        files: list[str] = []
        if len(reply.masks):
            base = self.names.claim(name, str(turn), prompt[:40])
            with replacing(self.folder / f"{base}_overlay.jpg") as file:
                overlay(image, reply.masks, enlarged=True).save(file, format="JPEG", quality=90)
        for index, (mask, logits, score) in enumerate(zip(reply.masks, reply.logits, reply.scores)):
            own = base if len(reply.masks) == 1 else self.names.claim(base, f"seg{index}")
            with replacing(self.folder / f"{own}.png") as file:
                Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG")
            written = {"mask": f"{own}.png", "overlay": f"{base}_overlay.jpg"}
            if self.save_logits:
                with replacing(self.folder / f"{own}.npy") as file, open(file, "wb") as opened:
                    np.save(opened, logits)
                written["logits"] = f"{own}.npy"
            files.append(written["mask"])
            self.records.append(record | describe(mask, score) | written)
        if self.answers is not None:
            self.answers.append(record | {"masks": files})

    def write(self, *, now: bool = False) -> None:
        """Write the records; unless `now`, only when the last writing is a while ago."""
        if not now and time.monotonic() - self.saved < SAVE_EVERY:
            return
        write_json(self.folder / "predictions.json", self.records)
        if self.answers is not None:
            write_json(self.folder / "answers.json", self.answers)
        self.saved = time.monotonic()
