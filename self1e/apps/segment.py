"""Masks for your own photos, from the command line, on one process or on one for each GPU.

    self1e segment --version V --image a.jpg photos/ --prompt "the red car" "Which one flies?" --output out/
    self1e segment --version V --image asked.csv --output out/                  # columns image and prompt
    torchrun --nproc_per_node 8 -m self1e segment --version V --image photos/ --prompt "the red car" --output out/

Cost: one forward pass for `--batch_tokens` tokens, of which a photo of one tile with a prompt has about 310; the 2B
model's weights take 4 GB in bf16 (GPU), 8 GB in fp32 (CPU).

Written to the output folder: a line in records.jsonl for each photo and prompt; at the end coco.json, a COCO data set
with an image per photo, a category per prompt and an annotation per mask (RLE) that is not empty; and NAME.png (the
mask, 0 or 255, at the size of the upright photo) and NAME_overlay.jpg for each photo and prompt.

A second run into the same folder does what its records do not hold yet; another model or other settings are refused.
A photo that cannot be read is one line on the screen and the run goes on; the exit code is then 1.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from tqdm import tqdm

from self1e import Self1EForSegmentation, Self1EProcessor, distributed
from self1e.apps.loading import add_model_flags, load
from self1e.data.masks import encode_mask
from self1e.data.samples import inside
from self1e.data.sets.custom import table_rows, texts_of
from self1e.errors import UserError
from self1e.evaluation.loop import WAIT, prepared, progress
from self1e.evaluation.results import claim_folder, weights_identity
from self1e.files import alone_in, check_fetched, check_writable, read_records, replacing, to_jsonl
from self1e.flags import Help, precision_on
from self1e.model.inference import Reply, logit_of, masks_of, reply_of
from self1e.model.photos import FORMATS, photo_of
from self1e.model.prompts import ANSWER, check_prompt, evaluation_prompt
from self1e.stop import stop_requests
from self1e.visualize import overlay

PHOTOS = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} | {".heic", ".heif"}
FEW = 100  # photos that get masks and overlays unless the flags say otherwise
TOGETHER = 16  # photos in one forward pass, at most
WRITERS = 2  # threads that write the photos of a forward pass during the next one


class Job(NamedTuple):
    path: Path
    prompts: list[str]


def prompt_text(argument: str) -> str:
    """A prompt as it was typed, also where the locale of the terminal is not UTF-8."""
    return os.fsencode(argument).decode("utf-8")


def flags(command: str, description: str | None) -> argparse.ArgumentParser:
    """The flags that segment and chat share."""
    parser = argparse.ArgumentParser(f"self1e {command}", None, description, formatter_class=Help, allow_abbrev=False)
    add_model_flags(parser)
    # fmt: off
    add = parser.add_argument
    add("--image", nargs="+", required=True, metavar="PATH", help="photos, folders, .txt with a path per line, or "
        ".csv and .jsonl with `image` and, where photos have their own prompts, `prompt`; paths relative to the file")
    add("--prompt", nargs="+", default=[], type=prompt_text, metavar="TEXT", help="asked of every photo, one by one")
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--overwrite", action="store_true", help="remove what an earlier run wrote there, and begin anew")
    add("--threshold", type=float, default=0.5, help="foreground probability above which a pixel belongs to the mask")
    add("--masks", action=argparse.BooleanOptionalAction, help=f"NAME.png; unset: for up to {FEW} photos")
    add("--overlays", action=argparse.BooleanOptionalAction, help=f"NAME_overlay.jpg; unset: for up to {FEW} photos")
    add("--workers", type=int, help="processes that decode and tile photos; unset: 4 for each GPU, 1 on a CPU")
    # fmt: on
    return parser


def photos_of(path: Path, output: Path) -> list[tuple[Path, str]]:
    """The photos that a path of `--image` stands for, each with the prompt that it has there, or "".

    Of a folder those in its subfolders, too, without hidden files and what lies in `output`.
    """
    if path.is_dir():
        photos = [file for file in path.rglob("*") if file.suffix.lower() in PHOTOS]
        visible = [file for file in photos if "/." not in f"/{file.relative_to(path).as_posix()}"]
        return [(file, "") for file in visible if output not in file.resolve().parents]
    if path.suffix.lower() not in (".txt", ".csv", ".jsonl"):
        return [(path, "")]
    try:
        check_fetched(path)
        if path.suffix.lower() == ".txt":
            rows = [[line.strip(), ""] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        else:
            rows = [texts_of(*row, ["image"], "prompt") for row in table_rows(path, ["image"])]
        photos = [inside(path.parent, name, allow_outside=True) for name, _ in rows]
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"--image {path} is no list of photos: {error}") from error
    return [(Path(os.path.normpath(photo)), prompt) for photo, (_, prompt) in zip(photos, rows)]


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """The photos, as absolute paths, sorted, each once, with all that is asked of it. Raises UserError for neither."""
    logit_of(args.threshold)
    jobs: dict[Path, dict[str, None]] = {}
    for text in args.image:
        photos = photos_of(Path(os.path.abspath(inside(Path(), text, allow_outside=True))), args.output.resolve())
        if not photos:
            raise UserError(f"--image {text}: no photos in it, outside of --output ({', '.join(sorted(PHOTOS))})")
        for photo, own in photos:
            asked = jobs.setdefault(photo, dict.fromkeys(args.prompt))
            if own:
                asked[own] = None
    if absent := [str(path) for path in jobs if not path.exists()]:
        raise UserError(f"--image: no such file: {', '.join(absent[:10])}{', ...' if len(absent) > 10 else ''}")
    if not all(jobs.values()):
        raise UserError("no prompt: give --prompt, or a column `prompt` in --image")
    for prompt in {prompt for asked in jobs.values() for prompt in asked}:
        check_prompt(prompt)
    check_writable(args.output)
    return [Job(path, [*jobs[path]]) for path in sorted(jobs)]


def groups(photos: Iterable[tuple[Job, dict]], budget: int) -> Iterator[list[tuple[Job, dict]]]:
    """Neighbouring photos whose conversations, padded to the longest, have at most `budget` tokens; at least one."""
    group: list[tuple[Job, dict]] = []
    lengths: list[int] = []
    for job, made in photos:
        lengths += made["lengths"]
        if group and (len(lengths) * max(lengths) > budget or len(group) == TOGETHER):
            yield group
            group, lengths = [], [*made["lengths"]]
        group.append((job, made))
    if group:
        yield group


class Output:
    """A folder of masks, overlays and their records. A record is written after the files it names.

    records.jsonl has one line per photo and prompt: image, width, height, prompt, text, overlay and masks; a mask has
    COCO's segmentation, bbox (x, y, width, height in pixels), area and score (the mean foreground probability, 0 for
    an empty mask), and the names of its files. Until `merge` each process has a file of its own.

    photos: of this run; those of one name get other names for their files. done: (image, prompt) of earlier records.
    """

    def __init__(
        self, folder: Path, settings: dict, *, photos: Iterable[str | Path] = (), overwrite: bool = False,
        masks: bool = True, overlays: bool = True,
    ):  # fmt: skip
        self.folder, self.masks, self.overlays = folder, masks, overlays
        self.path = folder / "records.jsonl"
        self.done = distributed.on_main(partial(self._begin, settings, overwrite))
        images = {*map(str, photos), *(image for image, _ in self.done)}
        stems = Counter(slug(Path(image).stem).casefold() for image in images)
        self.shared = {stem for stem, number in stems.items() if number > 1}

    def _begin(self, settings: dict, overwrite: bool) -> set[tuple[str, str]]:
        for path in self.folder.glob("records.*jsonl") if overwrite else ():
            for record in read_records(path):
                for name in filter(None, [record.get("overlay"), *(mask.get("mask") for mask in record["masks"])]):
                    (self.folder / name).unlink(missing_ok=True)
            path.unlink()
        remedy = "Choose another folder, or --overwrite"
        claim_folder(self.folder, settings, overwrite=False, results="records.*jsonl", remedy=remedy)
        return self.merge()

    def merge(self) -> set[tuple[str, str]]:
        """Move what the processes have written to records.jsonl, one after the other; returns what is done."""
        parts, done = sorted(self.folder.glob("records.rank*.jsonl")), set()
        with replacing(self.path) as merged, open(merged, "w", encoding="utf-8") as file:
            for record in chain(read_records(self.path), *map(read_records, parts)):
                if (key := (record["image"], record["prompt"])) not in done:
                    file.write(to_jsonl([record]))
                    done.add(key)
        for part in parts:
            part.unlink()
        return done

    def save(self, path: str | Path, image: Any, prompt: str, reply: Reply) -> dict:
        """Write the files of one reply; returns its record. Threads may call it."""
        stem, what = slug(Path(path).stem), slug(prompt)[:40]
        name = f"{stem or 'photo'}__{what}"
        if not stem or stem.casefold() in self.shared or what.replace("_", " ") != prompt.casefold():
            name += f"-{hashlib.sha256(f'{path}|{prompt}'.encode(errors='surrogateescape')).hexdigest()[:8]}"
        height, width = reply.masks.shape[1:]
        record = {"image": str(path), "width": width, "height": height, "prompt": prompt, "text": reply.text}
        record["masks"] = []
        for number, (mask, score) in enumerate(zip(reply.masks, reply.scores), 1):
            own, rle = name if number == 1 else f"{name}__{number}", encode_mask(mask)
            found = {"segmentation": rle, "bbox": coco.toBbox(rle).tolist(), "area": int(mask.sum())}
            found["score"] = score or 0.0
            if self.masks:
                found["mask"] = f"{own}.png"
                Image.fromarray(mask.astype(np.uint8) * 255).save(self.folder / found["mask"])
            record["masks"].append(found)
        if self.overlays and record["masks"]:
            record["overlay"] = f"{name}_overlay.jpg"
            overlay(np.asarray(image), reply.masks).save(self.folder / record["overlay"], quality=90)
        return record

    def append(self, records: Iterable[dict]) -> None:
        """Write records whose files are there."""
        with open(self.folder / f"records.rank{distributed.rank()}.jsonl", "a", encoding="utf-8") as file:
            file.write(to_jsonl(records))

    def write_coco(self) -> None:
        """coco.json: all records as a COCO data set, file names relative to the folder that holds all the photos.

        For one process, after all have written. The masks go from file to file, one by one.
        """
        self.merge()
        images: dict[str, dict] = {}
        categories: dict[str, int] = {}
        for record in read_records(self.path):
            size = {name: record[name] for name in ("width", "height")}
            images.setdefault(record["image"], {"id": len(images) + 1, **size})
            categories.setdefault(record["prompt"], len(categories) + 1)
        root = os.path.commonpath([os.path.dirname(path) for path in images]) if images else ""
        for path, image in images.items():
            image["file_name"] = Path(os.path.relpath(path, root)).as_posix()
        head = {"info": {"description": "masks of Self1E"}, "images": [*images.values()]}
        head["categories"] = [{"id": number, "name": prompt} for prompt, number in categories.items()]
        with replacing(self.folder / "coco.json") as new, open(new, "w", encoding="utf-8") as file:
            file.write(to_jsonl([head])[:-2] + ', "annotations": [')
            found = ((record, mask) for record in read_records(self.path) for mask in record["masks"] if mask["area"])
            for number, (record, mask) in enumerate(found, 1):
                owner = {"image_id": images[record["image"]]["id"], "category_id": categories[record["prompt"]]}
                file.write("," * (number > 1) + "\n" + to_jsonl([{"id": number, **owner, "iscrowd": 0, **mask}])[:-1])
            file.write("]}\n")


def slug(text: str) -> str:
    """Part of a file's name: letters, digits, `.` and `-` stay, everything else between them becomes one `_`."""
    text = re.sub(r"([^\w.-]|_)+", "_", text).strip("._")
    return text.encode(sys.getfilesystemencoding(), "ignore")[:90].decode(errors="ignore")


def run(
    args: argparse.Namespace,
    prepare: Callable[[Self1EProcessor, bool, Job], dict],
    ask: Callable[[Self1EForSegmentation, Self1EProcessor, list[tuple[Job, dict]]], list[Iterable[Reply]]],
    settings: dict,
    budget: int = 0,
) -> int:
    """Ask every prompt of every photo, write what comes, and return the exit code.

    prepare: (processor, whether `image` is wanted, job) -> what workers make of a photo.
    ask: -> the replies about each photo; other threads iterate over them.
    settings: the flags of this command alone that change its masks. budget: of `groups`.
    """
    distributed.start("gloo", timeout=WAIT)
    jobs = distributed.on_main(partial(find_jobs, args))
    args.precision = args.precision or precision_on(distributed.device(args.device))
    settings = {name: getattr(args, name) for name in ("precision", "quantize", "max_tiles", "threshold")} | settings
    settings |= weights_identity(args.version, args.model_weights)
    masks, overlays = (len(jobs) <= FEW if given is None else given for given in (args.masks, args.overlays))
    kinds = {"overwrite": args.overwrite, "masks": masks, "overlays": overlays}
    with alone_in(args.output) if distributed.is_main() else nullcontext():
        output = Output(args.output, settings, photos=[job.path for job in jobs], **kinds)
        left = [Job(path, [one for one in asked if (str(path), one) not in output.done]) for path, asked in jobs]
        left = [job for job in left if job.prompts]
        if len(left) < len(jobs):
            distributed.say(f"{len(jobs) - len(left)} of {len(jobs)} photos are done already")
        broken: list[UserError] = []

        def skip(error: UserError) -> None:
            broken.append(error)
            tqdm.write(f"skipped: {error}", file=sys.stderr)

        def save(job: Job, made: dict, replies: Iterable[Reply]) -> list[dict]:
            pairs = zip(job.prompts, replies, strict=True)
            return [output.save(job.path, made["image"], prompt, reply) for prompt, reply in pairs]

        if left:
            own = left[distributed.rank() :: distributed.world_size()]
            model, processor = load(args)
            workers = args.workers
            if workers is None:
                workers = distributed.share_cores() if model.device.type == "cuda" else 1
            bar, begin = progress(len(own), desc="done", unit="photo"), time.monotonic()
            writing: list[Future[list[dict]]] = []
            with stop_requests() as asked_to_stop, ThreadPoolExecutor(WRITERS) as pool, bar:
                options = {"workers": workers, "broken": skip, "asked_to_stop": asked_to_stop}
                photos = prepared(own, partial(prepare, processor, overlays), **options)
                try:
                    for group in groups(photos, budget):
                        answers = ask(model, processor, group)
                        output.append(chain.from_iterable(future.result() for future in writing))
                        writing = [pool.submit(save, *photo, replies) for photo, replies in zip(group, answers)]
                        bar.update(len(group))
                finally:
                    output.append(chain.from_iterable(future.result() for future in writing))
            spent = time.monotonic() - begin
        bad = sum(distributed.gather(len(broken)))
        distributed.on_main(output.write_coco)
    if left:
        done = len(left) - bad
        speed = f"{spent:.1f} s, {done / spent:.1f} photos per second"
        distributed.say(f"the results of {done} photo{'s' * (done != 1)} are in {args.output}: {speed}")
    if bad and distributed.is_main():
        print(f"{bad} of {len(left)} photos could not be read, see above", file=sys.stderr)
    return 1 if bad else 0


def prepare_segment(
    is_sentence: bool | None, max_tiles: int, processor: Self1EProcessor, with_image: bool, job: Job
) -> dict:
    image = photo_of(job.path)
    conversations = [[evaluation_prompt(prompt, is_sentence, lower=True), ANSWER] for prompt in job.prompts]
    made = processor.encode(image, conversations, max_tiles=max_tiles)
    lengths, size = [len(ids) for ids, _ in made["texts"]], (image.height, image.width)
    return made | {"lengths": lengths, "size": size, "image": np.array(image) if with_image else None}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `self1e segment` with command line `argv`; returns the exit code."""
    parser = flags("segment", __doc__)
    add = parser.add_argument
    # fmt: off
    add("--batch_tokens", type=int, default=8192, help="tokens in one forward pass, padding included")
    add("--prompt_kind", choices=("auto", "phrase", "sentence"), default="auto",
        help="how prompts are asked; auto: what ends like a sentence is one")
    # fmt: on
    args = parser.parse_args(argv)

    def ask(model, processor, photos):
        batch = processor.collate([made for _, made in photos])
        limit = max(1, args.batch_tokens // batch["input_ids"].shape[1])
        options = {"threshold": args.threshold, "conversations_per_forward": limit}
        found = iter(masks_of(model, batch, [made["size"] for _, made in photos], **options))
        own = [[next(found) for _ in job.prompts] for job, _ in photos]
        return [(reply_of(ANSWER, *masks) for masks in each) for each in own]

    prepare = partial(prepare_segment, {"phrase": False, "sentence": True}.get(args.prompt_kind), args.max_tiles)
    return run(args, prepare, ask, {"prompt_kind": args.prompt_kind}, args.batch_tokens)
