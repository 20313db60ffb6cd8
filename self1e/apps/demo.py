"""A web page to try a model: a picture, prompts, masks.

    pip install 'self1e[demo]'
    python -m self1e.apps.demo --version runs/exp/ckpt_model        # then open http://127.0.0.1:7860

Serves this machine only unless `--host` says otherwise, one request at a time, at most `--queue` waiting. Neither the
server nor its page contacts any other machine.
"""

import argparse
import html
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from self1e.apps.predict import Results, add_model_arguments, ask, load
from self1e.model.inference import Reply
from self1e.model.processing import HIGH_RES_TILES
from self1e.model.prompts import SEG
from self1e.visualize import PALETTE, overlay

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the demo needs Gradio: pip install 'self1e[demo]'") from error

MODES = {"Segment: one mask a prompt": "segment", "Chat: the model answers": "chat"}
KEEP = 3600  # seconds that downloads stay
CSS = """
.answer p {margin: 0.35em 0; line-height: 1.6}
.answer .prompt {opacity: 0.75}
.answer .seg {border-radius: 4px; padding: 1px 6px; font-weight: 600}
footer {display: none !important}
"""


def colors(count: int) -> list[tuple[int, int, int]]:
    """One colour a mask, in turn."""
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def answer_html(prompts: Sequence[str], replies: Sequence[Reply]) -> str:
    """Prompts and answers, each `[SEG]` in the colour of its mask, with its area and score."""
    palette = iter(colors(sum(len(reply.masks) for reply in replies)))
    lines = []
    for prompt, reply in zip(prompts, replies):
        pieces = html.escape(reply.text).split(SEG)
        text = pieces[0]
        for mask, score, piece in zip(reply.masks, reply.scores, pieces[1:]):
            red, green, blue = next(palette)
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else "white"
            note = "empty" if score is None else f"{mask.mean():.1%} of the picture, score {score:.2f}"
            style = f"background: rgb({red}, {green}, {blue}); color: {ink}"
            text += f'<span class="seg" style="{style}" title="{note}">[SEG]</span>{piece}'
        nothing = "" if len(reply.masks) else ' <span class="prompt">(no mask)</span>'
        lines.append(f'<p><span class="prompt">{html.escape(prompt)}</span><br>{text}{nothing}</p>')
    return f'<div class="answer">{"".join(lines)}</div>'


def paint(shown: tuple[Image.Image, np.ndarray] | None, opacity: float) -> Image.Image | None:
    """The overlay of the last answer, (photo, masks), at an opacity of 0..1."""
    if shown is None:
        return None
    image, masks = shown
    return overlay(image, masks, colors(len(masks)), opacity) if len(masks) else image


class Demo:
    """The page's work on one loaded model.

    Args:
        folder: where downloads are written; each request's are removed after `KEEP` seconds.
        max_megapixels: larger pictures are refused.
    """

    def __init__(self, model, processor, folder: Path, *, max_megapixels: float):
        self.model, self.processor, self.folder, self.max_megapixels = model, processor, folder, max_megapixels

    def answer(
        self, image: Image.Image | None, text: str, mode: str, threshold: float, high_res: bool, length: float,
        opacity: float,
    ) -> tuple:  # fmt: skip
        """Overlay, answer, downloads, and what `paint` needs. Raises gr.Error, which the page shows."""
        prompts = [line.strip() for line in (text or "").splitlines() if line.strip()]
        if image is None:
            raise gr.Error("Choose a picture first.", duration=None, title="No picture")
        if not prompts:
            raise gr.Error("Write at least one prompt, one a line.", duration=None, title="No prompt")
        size = image.width * image.height / 1e6
        if size > self.max_megapixels:
            message = f"The picture has {size:.1f} megapixels; this server takes {self.max_megapixels:g} at most."
            raise gr.Error(message, duration=None, title="Picture too large")
        begin = time.perf_counter()
        try:
            (replies,) = ask(
                self.model, self.processor, [image], prompts, mode=MODES[mode], threshold=threshold, batch_size=8,
                max_tiles=HIGH_RES_TILES if high_res else 1, max_new_tokens=int(length),
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise gr.Error("Out of GPU memory: switch high resolution off.", duration=None) from error
        except (ValueError, FloatingPointError) as error:
            raise gr.Error(str(error), duration=None) from error
        seconds = (time.perf_counter() - begin) / len(prompts)
        masks = np.concatenate([reply.masks for reply in replies])
        shown = (image, masks)
        return paint(shown, opacity), answer_html(prompts, replies), self.save(image, prompts, replies, seconds), shown

    def save(self, image: Image.Image, prompts: list[str], replies: list[Reply], seconds: float) -> list[str]:
        """Mask PNGs and predictions.json, as `self1e.apps.predict` writes them; their paths."""
        for old in self.folder.iterdir():
            if time.time() - old.stat().st_mtime > KEEP:
                shutil.rmtree(old)
        results = Results(Path(tempfile.mkdtemp(dir=self.folder)), save_logits=False)
        for turn, (prompt, reply) in enumerate(zip(prompts, replies)):
            results.add(Path("picture"), "mask", image, turn=turn, prompt=prompt, reply=reply, seconds=seconds)
        results.write(now=True)
        masks = [record["mask"] for record in results.records if record["mask"]]
        return [str(results.folder / name) for name in [*masks, "predictions.json"]]


def examples() -> list[list[str]]:
    """The pictures that ship with the package, with prompts, one a line."""
    folder = files("self1e.apps") / "demo_examples"
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return [[str(folder / name), "\n".join(lines)] for name, lines in prompts.items()]


def build(demo: Demo, name: str, *, queue: int) -> gr.Blocks:
    """The page. name: of the model, shown in its head. queue: requests that may wait."""
    with gr.Blocks(title="Self1E", analytics_enabled=False, delete_cache=(KEEP, KEEP)) as page:
        gr.Markdown(f"## Self1E\nA multimodal LLM that segments by itself. Model: `{name}`")
        shown = gr.State(None, time_to_live=KEEP)
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Picture", type="pil", sources=["upload", "webcam", "clipboard"], height=380,
                                 elem_id="picture")  # fmt: skip
                prompts = gr.Textbox(label="Prompts, one a line, each in its own colour", lines=3, elem_id="prompts",
                                     placeholder="the red car\nWhich of these can fly?")  # fmt: skip
                mode = gr.Radio(list(MODES), value=next(iter(MODES)), label="Mode", elem_id="mode")
                run = gr.Button("Run", variant="primary", elem_id="run")
                with gr.Accordion("More", open=False):
                    threshold = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Foreground probability threshold")
                    high_res = gr.Checkbox(False, label=f"High resolution (up to {HIGH_RES_TILES} tiles)")
                    length = gr.Slider(8, 1024, 256, step=8, label="Longest answer in chat, tokens")
            with gr.Column():
                result = gr.Image(label="Masks", type="pil", format="png", interactive=False, height=380,
                                  buttons=["fullscreen"], elem_id="overlay")  # fmt: skip
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", elem_id="opacity")
                answer = gr.HTML(label="Answer", elem_id="answer")
                downloads = gr.Files(label="Downloads: mask PNG, JSON", interactive=False, elem_id="downloads")
        gr.Examples(examples(), [image, prompts], label="Examples", cache_examples=False)
        settings = [image, prompts, mode, threshold, high_res, length, opacity]
        gr.on(
            [run.click, prompts.submit], demo.answer, settings, [result, answer, downloads, shown],
            api_name="answer", concurrency_limit=1,
        )  # fmt: skip
        opacity.change(paint, [shown, opacity], result, trigger_mode="always_last", show_progress="hidden",
                       api_visibility="private")  # fmt: skip
    return page.queue(max_size=queue, default_concurrency_limit=1)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m self1e.apps.demo", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 serves every machine that can reach this one")
    add("--port", type=int, default=7860)
    add("--queue", type=int, default=16, help="requests that may wait; more are refused")
    add("--max_megapixels", type=float, default=40.0, help="larger pictures are refused")
    add("--max_upload", default="30mb", help="larger files are refused")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and serve until Ctrl-C; returns the exit code."""
    args = parse_args(argv)
    Image.MAX_IMAGE_PIXELS = int(args.max_megapixels * 1e6)  # Pillow refuses to decode twice as many
    try:
        model, processor = load(
            args.version, args.model_weights, device=args.device, dtype=args.dtype, bits=args.quantize
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="self1e_demo_") as folder:
        demo = Demo(model, processor, Path(folder), max_megapixels=args.max_megapixels)
        page = build(demo, Path(args.model_weights or args.version).name, queue=args.queue)
        try:
            page.launch(
                server_name=args.host, server_port=args.port, share=False, ssr_mode=False, show_error=True, css=CSS,
                max_file_size=args.max_upload, theme=gr.themes.Default(font=["system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"]), footer_links=[],
            )  # fmt: skip
        except OSError as error:
            print(f"error: --port {args.port} on {args.host}: {error}", file=sys.stderr)
            return 1
    return 0
