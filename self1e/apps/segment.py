"""Masks for your own photos, from the command line.

    self1e segment --version V --image a.jpg photos/ --prompt "the red car" "Which one flies?" --output out/

Cost: one forward pass for `--batch_size` prompts; the 2B model's weights take 4 GB in bf16 (GPU), 8 GB in fp32 (CPU).

Written to the output folder, for each photo and prompt: NAME.png (the mask, 0 or 255, at the size of the upright
photo), NAME_overlay.jpg, a line in records.jsonl; and once coco.json, a COCO data set with an image per photo, a
category per prompt and an annotation per mask (RLE) that is not empty, which CVAT and other tools import.

A second run into the same folder adds to it: what its records hold already is not done again, so the same command
continues a run that was stopped. Another model or other settings are refused. A photo that cannot be read is one line
on the screen and the run goes on; the exit code is then 1.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.loading import add_model_flags, load
from self1e.data.masks import encode_mask
from self1e.data.samples import SampleError, load_image
from self1e.errors import UserError
from self1e.files import check_writable, write_json
from self1e.model.inference import Reply, image_groups
from self1e.model.processor import HIGH_RES_TILES
from self1e.model.prompts import check_prompt
from self1e.model.weights import weights_identity
from self1e.visualize import overlay

PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".pgm", ".heic", ".heif"}
Ask = Callable[[Self1EForSegmentation, Self1EProcessor, list[Image.Image], list[list[str]]], list[list[Reply]]]


def prompt_text(argument: str) -> str:
    """A prompt as it was typed, also where the locale of the terminal is not UTF-8."""
    return os.fsencode(argument).decode("utf-8")


def flags(command: str, description: str | None) -> argparse.ArgumentParser:
    """The flags that segment and chat share."""
    parser = argparse.ArgumentParser(
        prog=f"self1e {command}", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_flags(parser)
    # fmt: off
    add = parser.add_argument
    add("--image", nargs="+", required=True, metavar="PATH", help="photos, or folders of them")
    add("--prompt", nargs="+", default=[], type=prompt_text, metavar="TEXT", help="asked of every photo, one by one")
    add("--prompts_file", type=Path, metavar="FILE", help="more prompts, one per line")
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--overwrite", action="store_true", help="remove what an earlier run wrote there, and begin anew")
    add("--threshold", type=float, default=0.5, help="foreground probability above which a pixel belongs to the mask")
    add("--batch_size", type=int, default=8, help="prompts in one forward pass")
    add("--masks", action=argparse.BooleanOptionalAction, default=True, help="NAME.png")
    add("--overlays", action=argparse.BooleanOptionalAction, default=True, help="NAME_overlay.jpg")
    add("--save_logits", action="store_true", help="NAME.npy: float32 logits before the resize")
    # fmt: on
    return parser


def find_photos(arguments: Iterable[str], output: Path) -> list[Path]:
    """Files as given, and every photo in folders and their subfolders, sorted; each once, as absolute paths.

    Hidden files and what lies in `output` are left out. Raises UserError for a URL, a folder without photos, files
    that do not exist, and where `output` is one of the folders.
    """
    found: dict[Path, None] = {}
    for text in arguments:
        path = Path(os.path.abspath(text))
        if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
            raise UserError(f"--image {text}: URLs are not fetched; download the photo and give its path")
        if not path.is_dir():
            found[path] = None
            continue
        if path.resolve() == output.resolve():
            raise UserError(f"--output {output} holds the photos; choose another folder, or one inside it")
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in PHOTOS
            and output.resolve() not in file.resolve().parents
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not inside:
            raise UserError(f"--image {text}: no photos in this folder ({', '.join(sorted(PHOTOS))})")
        found |= dict.fromkeys(inside)
    if absent := [str(path) for path in found if not path.exists()]:
        raise UserError(f"--image: no such file: {', '.join(absent)}")
    return list(found)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line and of the file, each once. Raises UserError for none, or one that is none."""
    lines: list[str] = []
    if args.prompts_file:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file {args.prompts_file}: {error}") from error
    prompts = list(dict.fromkeys([*args.prompt, *(line.strip() for line in lines if line.strip())]))
    if not prompts:
        raise UserError("no prompt: give --prompt, or --prompts_file with one per line")
    for prompt in prompts:
        check_prompt(prompt)
    return prompts


class Output:
    """A folder of masks, overlays and their records. A record is written after the files it names.

    records.jsonl opens with the settings; then comes one line per photo and prompt: image, width, height, prompt,
    text, overlay and masks; a mask has COCO's segmentation, bbox (x, y, width, height in pixels), area and score (the
    mean foreground probability, 0 for an empty mask), and the names of its files. `done` holds (image, prompt) of all.

    Raises UserError for a folder with the records of other settings, unless `overwrite` removes them.
    """

    def __init__(
        self, folder: Path, settings: dict, *, overwrite: bool = False, masks: bool = True, overlays: bool = True,
        save_logits: bool = False,
    ):  # fmt: skip
        self.folder, self.masks, self.overlays, self.save_logits = folder, masks, overlays, save_logits
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "records.jsonl"
        if overwrite and self.path.exists():
            for name in (name for record in self.read() for name in files_of(record)):
                (folder / name).unlink(missing_ok=True)
            self.path.unlink()
        if self.path.exists():
            text = self.path.read_bytes()
            os.truncate(self.path, text.rfind(b"\n") + 1)  # a line that was being written when its run ended
        if not self.path.exists() or not self.path.stat().st_size:
            self._append({"settings": settings})
        with open(self.path, encoding="utf-8") as file:
            before = json.loads(next(file)).get("settings", {})
        different = [f"{key} {before.get(key)}, not {new}" for key, new in settings.items() if before.get(key) != new]
        if different:
            raise UserError(f"{folder} holds masks of {'; '.join(different)}: choose another folder, or --overwrite")
        self.taken = {Path(name).stem.casefold() for record in self.read() for name in files_of(record)}
        self.done = {(record["image"], record["prompt"]) for record in self.read()}

    def read(self) -> Iterator[dict]:
        """The records in the folder."""
        with open(self.path, encoding="utf-8") as file:
            next(file)
            yield from map(json.loads, file)

    def _append(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:  # "\udcff" is JSON's own way
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def claim(self, *parts: str) -> str:
        """Parts joined by `_` as a file name that is not taken, also where the file system ignores case."""
        text = "_".join(word for part in parts if (word := re.sub(r"[^\w.-]+", "_", part).strip("._")))
        text = text.encode(sys.getfilesystemencoding(), "ignore")[:180].decode(errors="ignore") or "photo"
        name, number = text, 2
        while name.casefold() in self.taken:
            name, number = f"{text}-{number}", number + 1
        self.taken.add(name.casefold())
        return name

    def add(self, path: str | Path, image: Image.Image, prompt: str, reply: Reply) -> None:
        """Write the files of one reply and then its record."""
        base = (Path(path).stem, prompt[:40])
        record: dict[str, Any] = {"image": str(path), "width": image.width, "height": image.height, "prompt": prompt}
        record |= {"text": reply.text, "masks": []}
        for mask, logits, score in zip(reply.masks, reply.logits, reply.scores):
            name, rle = self.claim(*base), encode_mask(mask)
            found = {"segmentation": rle, "bbox": coco.toBbox(rle).tolist(), "area": int(mask.sum())}
            found["score"] = score or 0.0
            if self.masks:
                found["mask"] = f"{name}.png"
                Image.fromarray(mask.astype(np.uint8) * 255).save(self.folder / found["mask"])
            if self.save_logits:
                found["logits"] = f"{name}.npy"
                np.save(self.folder / found["logits"], logits)
            record["masks"].append(found)
        if self.overlays and record["masks"]:
            record["overlay"] = f"{self.claim(*base, 'overlay')}.jpg"
            overlay(image, reply.masks).save(self.folder / record["overlay"], quality=90)
        self._append(record)
        self.done.add((record["image"], prompt))

    def write_coco(self) -> None:
        """coco.json: all records as a COCO data set, file names relative to the folder that holds all the photos."""
        images: dict[str, dict] = {}
        categories: dict[str, int] = {}
        annotations: list[dict] = []
        for record in self.read():
            size = {name: record[name] for name in ("width", "height")}
            image = images.setdefault(record["image"], {"id": len(images) + 1, "file_name": record["image"], **size})
            category = categories.setdefault(record["prompt"], len(categories) + 1)
            for mask in record["masks"]:
                if mask["area"]:
                    ids = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category, "iscrowd": 0}
                    annotations.append(ids | mask)
        root = os.path.commonpath([os.path.dirname(path) for path in images]) if images else ""
        for image in images.values():
            image["file_name"] = Path(os.path.relpath(image["file_name"], root)).as_posix()
        write_json(self.folder / "coco.json", {
            "info": {"description": "masks of Self1E"},
            "images": list(images.values()),
            "categories": [{"id": number, "name": prompt} for prompt, number in categories.items()],
            "annotations": annotations,
        })  # fmt: skip


def files_of(record: dict) -> list[str]:
    """The names of the files of a record."""
    names = [mask[kind] for mask in record["masks"] for kind in ("mask", "logits") if kind in mask]
    return [*names, *([record["overlay"]] if "overlay" in record else [])]


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, ask: Ask, settings: dict) -> int:
    """Ask every prompt of every photo, write what comes, and return the exit code.

    ask: (model, processor, photos, their prompts) -> per photo a reply per prompt.
    settings: what, beside the flags of both commands, makes other masks.
    """
    if not 0 < args.threshold < 1:
        parser.error(f"--threshold {args.threshold}: expected a probability above 0 and below 1")
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size}: expected at least 1")
    prompts, paths = read_prompts(args), find_photos(args.image, args.output)
    check_writable(args.output)
    settings = {name: getattr(args, name) for name in ("dtype", "quantize", "high_res", "threshold")} | settings
    settings |= weights_identity(args.version, args.model_weights)
    output = Output(
        args.output, settings, overwrite=args.overwrite, masks=args.masks, overlays=args.overlays,
        save_logits=args.save_logits,
    )  # fmt: skip
    work = [(path, [prompt for prompt in prompts if (str(path), prompt) not in output.done]) for path in paths]
    work = [(path, asked) for path, asked in work if asked]
    if len(work) < len(paths):
        print(f"{len(paths) - len(work)} of {len(paths)} photos are done already")
    if not work:
        output.write_coco()
        return 0
    model, processor = load(args.version, args.model_weights, device=args.device, dtype=args.dtype, bits=args.quantize)
    begin, done, broken = time.monotonic(), 0, 0
    try:
        for part in image_groups([len(asked) for _, asked in work], args.batch_size):
            group, loaded = work[part], []
            for path, asked in group:
                try:
                    loaded.append((path, load_image(path), asked))
                except SampleError as error:
                    print(f"skipped: {error.cause}", file=sys.stderr)
                    broken += 1
            found = ask(model, processor, [image for _, image, _ in loaded], [asked for *_, asked in loaded])
            for (path, image, asked), replies in zip(loaded, found):
                for prompt, reply in zip(asked, replies):
                    output.add(path, image, prompt, reply)
            before, done = done, done + len(group)
            if 10 * done // len(work) > 10 * before // len(work):  # one line per tenth
                print(f"{done} of {len(work)} photos, {done / (time.monotonic() - begin):.2f} per second", flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped after {done} of {len(work)} photos, which are in {args.output}; the same command continues"
        ) from None
    finally:
        output.write_coco()
    print(f"the masks of {done - broken} photos are in {args.output}")
    if broken:
        print(f"{broken} of {len(work)} photos could not be read, see above", file=sys.stderr)
    return 1 if broken else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `self1e segment` with command line `argv`; returns the exit code."""
    parser = flags("segment", __doc__)
    parser.add_argument(
        "--prompt_kind", choices=("auto", "phrase", "sentence"), default="auto",
        help="how prompts are asked; auto: what ends like a sentence is one",
    )  # fmt: skip
    args = parser.parse_args(argv)
    options = {
        "is_sentence": {"phrase": False, "sentence": True}.get(args.prompt_kind),
        "threshold": args.threshold,
        "max_tiles": HIGH_RES_TILES if args.high_res else 1,
        "conversations_per_forward": args.batch_size,
    }

    def ask(model, processor, images, prompts):
        found = model.segment(processor, images, prompts, **options) if images else []
        return [[each.as_reply() for each in replies] for replies in found]

    return run(parser, args, ask, {"prompt_kind": args.prompt_kind})
