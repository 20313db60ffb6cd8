"""The page of the demo and the work behind it. Import it when the environment of Gradio is set; see `demo.main`."""

import html
import json
import logging
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
import numpy as np
import torch
from PIL import Image

from self1e.apps.gate import bytes_in
from self1e.apps.results import Results
from self1e.apps.segmenting import ask
from self1e.data.samples import SampleError, load_image
from self1e.errors import UserError
from self1e.files import replacing
from self1e.model.inference import Reply
from self1e.model.photos import open_picture
from self1e.model.processor import HIGH_RES_TILES
from self1e.model.prompts import SEG
from self1e.visualize import PALETTE, enlarge, overlay

logger = logging.getLogger(__name__)
Image.MAX_IMAGE_PIXELS = None  # `Demo.read` looks at the size before it decodes, with a message for the page
MODES = {"Segment: one mask per prompt": "segment", "Chat: the model answers": "chat"}
KEEP = 3600  # seconds that a request's files stay
TOGETHER = 8  # prompts between two looks at Cancel; only their masks are in memory at a time
SHOWN = 1600  # pixels of the longer side of the overlay on the page
PACKING = threading.Lock()  # a cancelled request may still end its last part, and pack
LISTED = 12  # masks that are offered one by one, beside the ZIP that holds all
CSS = """
#overlay img, #picture img {width: 100%; height: 100%; object-fit: contain}
.answer {max-height: 24em; overflow-y: auto}
.answer p {margin: 0.35em 0; line-height: 1.6; overflow-wrap: anywhere}
.answer .prompt, .answer .note {opacity: 0.75}
.answer .seg {border-radius: 4px; padding: 1px 6px; font-weight: 600}
#downloads td.filename {display: flex; flex-wrap: wrap; max-width: none}
#downloads td.filename * {white-space: normal; overflow-wrap: anywhere; min-width: 0}
#downloads td.download {width: 6em; white-space: nowrap}
#downloads td:has(.label-clear-button) {display: none}
footer {display: none !important}
"""
# On a phone the result lies below the fold; bring it into view with Cancel above it when Run is pressed. Run waits for
# a Cancel just before it, until which the library drops the click: until the work has ended, 3 seconds at most.
RUN = """async () => {
    if (window.innerWidth < 768) document.querySelector('#cancel').scrollIntoView()
    await window.stopping
}"""
CANCEL = "() => { window.stopping = new Promise(done => { window.stopped = done; setTimeout(done, 3000) }) }"
ENDED = "() => { window.stopped?.() }"


@dataclass(frozen=True)
class Limits:
    """The most of one request: megapixels of its picture, prompts, characters per prompt, tokens per answer.

    disk: bytes that the results of all requests may take together. The flags of `demo` hold the defaults.
    """

    megapixels: float
    prompts: int
    characters: int
    disk: int
    tokens: int = 1024


def refuse(message: str) -> NoReturn:
    """Raise the error that the page shows; it is shown as HTML, so the text is escaped."""
    raise gr.Error(html.escape(message), duration=None, print_exception=False)


def uploaded(payload: Any) -> str | None:
    """The file of an upload as it is: the library would decode it before anyone asks for its size."""
    return None if payload is None else payload.path


def answer_html(prompts: Sequence[str], replies: Sequence[Reply], *, first: int = 0) -> str:
    """Prompts and answers, each `[SEG]` in the colour of its mask, with its area and score. first: mask's number."""
    lines, number = [], first
    for prompt, reply in zip(prompts, replies):
        pieces = html.escape(reply.text).split(SEG)
        text, notes = pieces[0], []
        for mask, score, piece in zip(reply.masks, reply.scores, pieces[1:]):
            red, green, blue = PALETTE[number % len(PALETTE)]
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"
            text += (
                f'<span class="seg" style="background: rgb({red}, {green}, {blue}); color: {ink}">{SEG}</span>{piece}'
            )
            notes.append("empty mask" if score is None else f"score {score:.2f}, {mask.mean():.1%} of the picture")
            number += 1
        note = "; ".join(notes) or "no mask"
        lines.append(
            f'<p><span class="prompt">{html.escape(prompt)}</span> <span class="note">({note})</span><br>{text}</p>'
        )
    return "".join(lines)


def masks_of(folder: str) -> list[dict]:
    """The records of a request's masks so far."""
    return json.loads(Path(folder, "predictions.json").read_text(encoding="utf-8"))


def pack(folder: str | None) -> list[str] | None:
    """Write a ZIP of what a request has made so far; the paths of what is offered, None when it is no more there."""
    if folder is None or not Path(folder, "picture.png").is_file():
        return None
    made = masks_of(folder)
    masks, overlays = ([*dict.fromkeys(record[kind] for record in made)] for kind in ("mask", "overlay"))
    records = [name for name in ("predictions.json", "answers.json") if Path(folder, name).is_file()]
    with PACKING, replacing(Path(folder, "masks.zip")) as file, zipfile.ZipFile(file, "w") as archive:
        for name in ["picture.png", *records, *masks, *overlays]:
            archive.write(Path(folder, name), name)
    few = [*masks, *overlays] if len(masks) <= LISTED else []
    return [str(Path(folder, name)) for name in ["masks.zip", *records, *few]]


def paint(folder: str | None, opacity: float) -> Image.Image | None:
    """The overlay of a request's masks at an opacity of 0..1, from its files; None when there is none any more."""
    picture = Path(folder or "", "picture.png")
    if folder is None or not picture.is_file():
        return None
    with Image.open(picture) as opened:
        image = enlarge(opened.convert("RGB"))
    for number, record in enumerate(masks_of(folder)):
        with Image.open(Path(folder, record["mask"])) as mask:
            small = np.asarray(mask.resize(image.size, Image.Resampling.NEAREST)) > 0
        image = overlay(image, small, [PALETTE[number % len(PALETTE)]], opacity)
    return image


class Demo:
    """The page's work on one loaded model. folder: where requests write; each one's files go after `KEEP` seconds."""

    def __init__(self, model: Any, processor: Any, folder: Path, limits: Limits):
        self.model, self.processor, self.folder, self.limits = model, processor, folder, limits

    def read(self, path: str | None) -> Image.Image:
        """The picture, upright RGB. Its size is checked before it is decoded. Raises gr.Error."""
        if path is None:
            refuse("Choose a picture first.")
        unreadable = "This file is no picture that can be read: choose a JPEG, PNG or WebP."
        try:
            with open_picture(path) as opened:
                size = opened.width * opened.height / 1e6
        except Exception:  # Pillow's decoders raise almost anything
            refuse(unreadable)
        if size > self.limits.megapixels:
            message = f"The picture has {size:.1f} megapixels; this server takes {self.limits.megapixels:g} at most."
            refuse(message)
        try:
            return load_image(path)
        except SampleError:
            refuse(unreadable)

    def check(self, text: str | None) -> list[str]:
        """The prompts, one per line. Raises gr.Error."""
        prompts = [line.strip() for line in (text or "").splitlines() if line.strip()]
        if not prompts:
            refuse("Write at least one prompt, one per line.")
        if len(prompts) > self.limits.prompts:
            refuse(f"{len(prompts)} prompts are too many: this server takes {self.limits.prompts} at a time.")
        longest = max(map(len, prompts))
        if longest > self.limits.characters:
            refuse(f"A prompt of {longest} characters is too long: this server takes {self.limits.characters}.")
        return prompts

    def answer(
        self, path: str | None, text: str, mode: str, threshold: float, high_res: bool, length: float, opacity: float
    ) -> Iterator[tuple]:
        """After every few prompts: overlay, answer, downloads, and the folder that `paint` needs. Raises gr.Error."""
        image, prompts = self.read(path), self.check(text)
        if (
            mode not in MODES
            or not 0 < threshold < 1
            or not 1 <= length <= self.limits.tokens
            or not 0 <= opacity <= 1
        ):
            refuse("A setting is outside its range.")
        for old in self.folder.iterdir():
            if time.time() - old.stat().st_mtime > KEEP:
                shutil.rmtree(old, ignore_errors=True)
        if bytes_in(self.folder) >= self.limits.disk:
            refuse("The server has no space left for results; try again later.")
        chat = MODES[mode] == "chat"
        results = Results(Path(tempfile.mkdtemp(dir=self.folder)), answers=chat)
        shown = image.copy()
        shown.thumbnail((SHOWN, SHOWN))
        shown.save(results.folder / "picture.png", compress_level=1)
        lines = ""
        for start in range(0, len(prompts), TOGETHER):
            some = prompts[start : start + TOGETHER]
            begin = time.perf_counter()
            try:
                (replies,) = ask(
                    self.model, self.processor, [image], some, mode=MODES[mode], threshold=threshold,
                    batch_size=TOGETHER, max_tiles=HIGH_RES_TILES if high_res else 1, max_new_tokens=int(length),
                )  # fmt: skip
            except torch.OutOfMemoryError:
                refuse("Out of GPU memory: switch high resolution off.")
            except (UserError, FloatingPointError) as error:
                refuse(str(error))
            seconds = (time.perf_counter() - begin) / len(some)
            lines += answer_html(some, replies, first=len(results.records))
            for turn, (prompt, reply) in enumerate(zip(some, replies), start):
                results.add(
                    Path("picture.png"), "mask", image, place=(0, turn), prompt=prompt, reply=reply, seconds=seconds
                )
            results.write(now=True)
            last = start + TOGETHER >= len(prompts)
            waiting = "" if last else f"<p>{start + len(some)} of {len(prompts)} prompts are done.</p>"
            folder = str(results.folder)
            downloads = pack(folder) if last else None
            yield paint(folder, opacity), f'<div class="answer">{lines}{waiting}</div>', downloads, folder


class Page(gr.Blocks):
    """Blocks that answer a call which fails with one sentence; the log alone holds the traceback."""

    async def process_api(self, *args, **kwargs) -> dict[str, Any]:
        try:
            return await super().process_api(*args, **kwargs)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception:  # a fault of ours, or whatever a forged call makes the library raise
            logger.exception("a call failed")
            refuse("The request could not be answered.")


def examples() -> list[list[str]]:
    """The pictures that ship with the package, with prompts, one per line."""
    folder = files("self1e.apps") / "demo_examples"
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return [[str(folder / name), "\n".join(lines)] for name, lines in prompts.items()]


def build(demo: Demo, name: str, *, queue: int, high_res: bool = False) -> gr.Blocks:
    """The page. name: of the model, shown in its head. queue: requests that may wait. high_res: ticked at first."""
    with Page(title="Self1E", analytics_enabled=False, delete_cache=(KEEP, KEEP)) as page:
        gr.Markdown(f"## Self1E\nA multimodal LLM that segments by itself. Model: {html.escape(name)}")
        shown = gr.State(None, time_to_live=KEEP)
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Picture", type="filepath", sources=["upload", "webcam", "clipboard"],
                                 height=380, elem_id="picture")  # fmt: skip
                image.preprocess = uploaded  # type: ignore[method-assign]
                prompts = gr.Textbox(label="Prompts, one per line, each in its own colour", lines=3, elem_id="prompts",
                                     max_lines=10, placeholder="the red car\nWhich of these can fly?")  # fmt: skip
                mode = gr.Radio(list(MODES), value=next(iter(MODES)), label="Mode", elem_id="mode")
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="run")
                    cancel = gr.Button("Cancel", elem_id="cancel")
                with gr.Accordion("More", open=False):
                    threshold = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Foreground probability threshold")
                    tiles = gr.Checkbox(high_res, label=f"High resolution (up to {HIGH_RES_TILES} tiles)")
                    length = gr.Slider(8, demo.limits.tokens, min(256, demo.limits.tokens), step=8,
                                       label="Longest answer in chat, tokens")  # fmt: skip
            with gr.Column():
                result = gr.Image(label="Masks", type="pil", format="png", interactive=False, height=380,
                                  buttons=["fullscreen", "download"], elem_id="overlay")  # fmt: skip
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", elem_id="opacity")
                answer = gr.HTML(label="Answer", elem_id="answer")
                downloads = gr.Files(label="Downloads: everything as ZIP, records, masks, overlays",
                                     interactive=False, elem_id="downloads")  # fmt: skip
        gr.Examples(examples(), [image, prompts], label="Examples", cache_examples=False)
        settings = [image, prompts, mode, threshold, tiles, length, opacity]
        asked = gr.on([run.click, prompts.submit], None, js=RUN, api_visibility="private")
        work = asked.then(
            demo.answer, settings, [result, answer, downloads, shown],
            api_name="answer", concurrency_limit=1, show_progress_on=result,
        )  # fmt: skip
        work.then(None, js=ENDED, api_visibility="private")
        stopped = cancel.click(None, js=CANCEL, cancels=[work], api_visibility="private")
        stopped.then(pack, shown, downloads, queue=False, show_progress="hidden", api_visibility="private")
        opacity.change(paint, [shown, opacity], result, trigger_mode="always_last", show_progress="hidden",
                       api_visibility="private")  # fmt: skip
    return page.queue(max_size=queue, default_concurrency_limit=1)
