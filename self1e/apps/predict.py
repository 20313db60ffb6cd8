"""Masks for your own pictures, from the command line.

    self1e segment --version V --image a.jpg photos/ --prompt "the red car" "Which one flies?" --output out/

Cost: one forward pass for `--batch_size` prompts; the 2B model's weights take 4 GB in bf16 (GPU), 8 GB in fp32 (CPU).

Written to `--output`, for each picture and prompt: `<name>.png` (the mask, 0 or 255, at the picture's upright size),
`<name>_overlay.jpg`, with `--save_logits` `<name>.npy` (float32, before the resize), and one `predictions.json`: a
list with one entry a mask, in COCO's result format (`segmentation` is RLE, `bbox` is x, y, width, height in pixels,
`area` in pixels, `score` is the mean foreground probability over the mask) plus `image`, `width`, `height`, `prompt`,
`text`, `seconds` of the model and the names of its files. What a chat answer without `[SEG]` leaves out is null.

Exit code: 0; 1 when a picture could not be read (it is reported and skipped) or the run broke off (what was done
before is on disk and in predictions.json); 2 for wrong arguments.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from tqdm import tqdm
from transformers import BitsAndBytesConfig

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.data.sample import SampleError, load_image
from self1e.model.configuration import DTYPES
from self1e.model.inference import Reply
from self1e.model.processing import HIGH_RES_TILES
from self1e.model.prompts import check_prompt
from self1e.visualize import overlay

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".pgm"}
# torch's own names are taken, too.
PRECISIONS = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
UNQUANTIZED = ["lm_head", "segmentation_head", "model.multi_modal_projector"]
SAVE_EVERY = 30  # seconds between two writings of predictions.json


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `mps` -> device. Raises ValueError when it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    if not available[name]:
        raise ValueError(f"--device {name}: torch finds none here; use --device auto")
    return torch.device(name)


def quantization(bits: int, dtype: torch.dtype):
    """bitsandbytes' 8- or 4-bit (NF4) weights for `from_pretrained(quantization_config=...)`; `dtype` computes.

    Embeddings, projector, `lm_head` and segmentation head stay as they are: they are trained in full, not by adapters.
    Raises ImportError where bitsandbytes is not installed, ValueError for other bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"--quantize {bits}: bitsandbytes has 4 and 8 bits")
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"--quantize {bits} needs bitsandbytes: pip install bitsandbytes")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=UNQUANTIZED
    )


def load(
    version: str,
    weights: str | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    bits: int | None = None,
) -> tuple[Self1EForSegmentation, Self1EProcessor]:
    """Model and processor of a trained checkpoint, ready to predict.

    Args:
        version: folder or hub id. weights: `--model_weights` over it, or None for the head inside `version`.
        device: `auto` takes a GPU where there is one. dtype: of `PRECISIONS`; default bf16 on a GPU, else fp32.
        bits: 4 or 8, see `quantization`.

    Raises:
        ValueError: no trained head, a device that is not there, or weights that do not fit.
        OSError: no such checkpoint. ImportError: see `quantization`.
    """
    place = pick_device(device)
    kwargs = {"dtype": PRECISIONS[dtype or ("bf16" if place.type == "cuda" else "fp32")]}
    if bits is not None:
        kwargs |= {"quantization_config": quantization(bits, kwargs["dtype"]), "device_map": {"": place}}
    model = Self1EForSegmentation.from_pretrained(version, weights=weights, **kwargs)
    if not model.trained_head:
        raise ValueError(
            f"{version} is a base model without a trained segmentation head: give the trained weights with "
            "--model_weights, or a trained folder as --version"
        )
    processor = Self1EProcessor.from_pretrained(version)
    return (model if bits is not None else model.to(place)).eval(), processor


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `load` takes, shared with the demo."""
    add = parser.add_argument
    add("--version", required=True, metavar="V", help="model folder or hub id")
    add("--model_weights", metavar="W", help="trained weights over --version; default: the head inside --version")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=PRECISIONS, help="default: bf16 on a CUDA GPU, else fp32")
    add("--quantize", type=int, choices=(4, 8), metavar="BITS", help="4 or 8 bits a weight (bitsandbytes)")
    add("--high_res", action="store_true", help=f"up to {HIGH_RES_TILES} tiles a picture (trained with it, too)")


def find_pictures(arguments: Iterable[str | Path], output: Path) -> list[Path]:
    """Files as given, and every picture in folders and their subfolders, sorted; each file once.

    Hidden files and what lies in `output` are left out. Raises ValueError for a folder without pictures, or when
    `output` is one of the folders. That a file exists and is a picture shows when it is read.
    """
    found: dict[Path, None] = {}
    for path in map(Path, arguments):
        if not path.is_dir():
            found[path] = None
            continue
        if path.resolve() == output.resolve():
            raise ValueError(f"--output {output}: holds the pictures; choose another folder, or one inside it")
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in PICTURES
            and output.resolve() not in file.resolve().parents
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not inside:
            raise ValueError(f"--image {path}: no pictures in this folder ({', '.join(sorted(PICTURES))})")
        found |= dict.fromkeys(inside)
    return list(found)


def read_prompts(file: Path) -> list[str]:
    """One prompt a line, empty lines left out. Raises ValueError when nothing is left or it is no UTF-8 text."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts_file {file}: not UTF-8 text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {file}: holds no prompt; expected one a line")
    return prompts


class Names:
    """File names that no two results share, also where the file system ignores case."""

    def __init__(self):
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def ask(
    model,
    processor,
    images: list[Image.Image],
    prompts: list[str],
    *,
    mode: str,
    threshold: float,
    max_tiles: int,
    batch_size: int,
    max_new_tokens: int,
    is_sentence: bool | None = None,
) -> list[list[Reply]]:
    """Every prompt to every picture, per picture a reply a prompt. mode: `segment` or `chat`; the rest as theirs."""
    options = {"threshold": threshold, "max_tiles": max_tiles, "rows_per_forward": batch_size}
    if mode == "segment":
        found = model.segment(processor, images, prompts, is_sentence=is_sentence, **options)
        return [[Reply(x.text, x.mask[None], x.logits[None], [x.score]) for x in row] for row in found]
    photos = [image for image in images for _ in prompts]
    replies = model.chat(processor, photos, prompts * len(images), max_new_tokens=max_new_tokens, **options)
    return [replies[start : start + len(prompts)] for start in range(0, len(replies), len(prompts))]


def describe(mask: np.ndarray, score: float | None) -> dict:
    """COCO's fields of a mask, bool (H, W); `counts` is text, so that it fits into JSON."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "bbox": coco.toBbox(rle).tolist(),
        "area": int(mask.sum()),
        "score": score,
    }


class Results:
    """Writes masks, overlays and logits as they come, and `predictions.json`; nothing appears half written."""

    def __init__(self, folder: Path, *, save_logits: bool):
        self.folder, self.save_logits = folder, save_logits
        self.records: list[dict] = []
        self.names, self.saved = Names(), 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self, path: Path, name: str, image: Image.Image, *, turn: int, prompt: str, reply: Reply, seconds: float
    ) -> None:
        """Files and records of one reply; `turn` is the prompt's number."""
        record = {"image": str(path), "width": image.width, "height": image.height}
        record |= {"prompt": prompt, "text": reply.text, "seconds": round(seconds, 4)}
        if not len(reply.masks):
            absent = ("segmentation", "bbox", "area", "score", "mask", "overlay", "logits")
            self.records.append(record | dict.fromkeys(absent))
            return
        base = self.names.claim(name, str(turn), prompt[:40])
        with replacing(self.folder / f"{base}_overlay.jpg") as file:
            overlay(image, reply.masks).save(file, format="JPEG", quality=90)
        for index, (mask, logits, score) in enumerate(zip(reply.masks, reply.logits, reply.scores)):
            own = base if len(reply.masks) == 1 else self.names.claim(base, f"seg{index}")
            with replacing(self.folder / f"{own}.png") as file:
                Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG")
            if self.save_logits:
                with replacing(self.folder / f"{own}.npy") as file, open(file, "wb") as opened:
                    np.save(opened, logits)
            files = {"mask": f"{own}.png", "overlay": f"{base}_overlay.jpg"}
            files["logits"] = f"{own}.npy" if self.save_logits else None
            self.records.append(record | describe(mask, score) | files)

    def write(self, *, now: bool = False) -> None:
        """Write predictions.json; unless `now`, only when the last writing is a while ago."""
        if not now and time.monotonic() - self.saved < SAVE_EVERY:
            return
        with replacing(self.folder / "predictions.json") as file:
            file.write_text(json.dumps(self.records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.saved = time.monotonic()


def predict(model, processor, paths: Sequence[Path], prompts: Sequence[str], results: Results, **options) -> list[str]:
    """Ask every prompt of every picture and write what comes. options: of `ask`.

    Returns messages about the pictures that could not be read. What was finished before any error is written.
    """
    names, unreadable = picture_names(paths), []
    together = max(1, options["batch_size"] // len(prompts))
    bar = tqdm(total=len(paths), unit="picture", disable=len(paths) == 1)
    try:
        for start in range(0, len(paths), together):
            loaded = []
            for path, name in zip(paths[start : start + together], names[start : start + together]):
                try:
                    loaded.append((path, name, load_image(path)))
                except SampleError as error:
                    unreadable.append(error.cause)
                    tqdm.write(f"skipped: {error.cause}", file=sys.stderr)
            if loaded:
                begin = time.perf_counter()
                found = ask(model, processor, [image for *_, image in loaded], list(prompts), **options)
                seconds = (time.perf_counter() - begin) / (len(loaded) * len(prompts))
                for entry, replies in zip(loaded, found):
                    for turn, (prompt, reply) in enumerate(zip(prompts, replies)):
                        results.add(*entry, turn=turn, prompt=prompt, reply=reply, seconds=seconds)
                results.write()
            bar.update(min(together, len(paths) - start))
    finally:
        bar.close()
        results.write(now=True)
    return unreadable


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m self1e.apps.predict", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add_model_arguments(parser)
    add("--image", nargs="+", required=True, metavar="PATH", help="pictures, or folders of them")
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="asked of every picture, each by itself")
    add("--prompts_file", type=Path, metavar="FILE", help="more prompts, one a line")
    add("--output", type=Path, required=True, metavar="FOLDER", help="files of the same names are replaced")
    add(
        "--mode",
        choices=("segment", "chat"),
        default="segment",
        help="segment: one mask a prompt, the answer is given; chat: the model writes, one mask for every [SEG]",
    )
    add(
        "--prompt_kind",
        choices=("auto", "phrase", "sentence"),
        default="auto",
        help="how segment asks; auto: what ends with . ? or ! is a sentence",
    )
    add("--threshold", type=float, default=0.5, help="foreground probability above which a pixel belongs to the mask")
    add("--max_new_tokens", type=int, default=256, help="length limit of chat's answers")
    add("--batch_size", type=int, default=8, help="prompts in one forward pass")
    add("--save_logits", action="store_true", help="also <name>.npy: float32 logits before the resize")
    args = parser.parse_args(argv)
    try:
        args.prompts = args.prompt + (read_prompts(args.prompts_file) if args.prompts_file else [])
        if not args.prompts:
            raise ValueError("no prompt: give --prompt or --prompts_file")
        for prompt in args.prompts:
            check_prompt(prompt)
        args.pictures = find_pictures(args.image, args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not 0 < args.threshold < 1:
        parser.error(f"--threshold {args.threshold}: expected a probability above 0 and below 1")
    if args.batch_size < 1 or args.max_new_tokens < 1:
        parser.error("--batch_size and --max_new_tokens must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command line `argv`; returns the exit code."""
    args = parse_args(argv)
    try:
        model, processor = load(
            args.version, args.model_weights, device=args.device, dtype=args.dtype, bits=args.quantize
        )
        results = Results(args.output, save_logits=args.save_logits)
        unreadable = predict(
            model,
            processor,
            args.pictures,
            args.prompts,
            results,
            mode=args.mode,
            threshold=args.threshold,
            max_tiles=HIGH_RES_TILES if args.high_res else 1,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            is_sentence={"auto": None, "phrase": False, "sentence": True}[args.prompt_kind],
        )
    except torch.OutOfMemoryError as error:
        print(f"error: out of GPU memory, try a smaller --batch_size or --quantize 8 ({error})", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    masks = sum(record["mask"] is not None for record in results.records)
    pictures = len(args.pictures) - len(unreadable)
    print(f"{masks} masks of {pictures} pictures in {args.output}")
    if unreadable:
        print(f"{len(unreadable)} pictures could not be read:\n  " + "\n  ".join(unreadable), file=sys.stderr)
    return 1 if unreadable else 0
