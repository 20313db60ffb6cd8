"""A web page to try a model: a photo, prompts, masks.

    pip install 'self1e[demo]'
    self1e demo --version runs/exp/ckpt_model        # then open http://127.0.0.1:7860

Serves this machine only unless `--host` says otherwise, one request at a time. Neither the server nor its page
contacts any other machine. Uploads and results lie in one temporary folder: a visitor's files go after an hour, all of
them when the server ends (Ctrl-C or SIGTERM).
"""

import argparse
import html
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from self1e import Self1EProcessor
from self1e.apps.loading import add_model_flags, load
from self1e.apps.segment import Output
from self1e.errors import UserError
from self1e.flags import Help
from self1e.model.inference import Reply
from self1e.model.photos import photo_of
from self1e.model.prompts import SEG, check_prompt
from self1e.visualize import PALETTE, overlay

SEGMENT, CHAT = "Segment: one mask per prompt", "Chat: the model answers"
TOGETHER = 8  # prompts between two chances to cancel
PROMPTS, CHARACTERS = 100, 20_000  # limits of one request
KEEP = 3600  # seconds that the files of a request stay
CSS = "#answers {max-height: 24em; overflow-y: auto} footer {display: none !important}"


def marked(prompts: Sequence[str], replies: Sequence[Reply]) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """Prompts and answers for `gr.HighlightedText`, and the colours of their `[SEG]`, which are those of the masks.

    A mask's label: its number, its share of the photo, its score.
    """
    text: list[tuple[str, Any]] = []
    colors: dict[str, str] = {}
    for prompt, reply in zip(prompts, replies):
        first, *rest = reply.text.split(SEG)
        text.append((f"{prompt}: {first}", None))
        for mask, score, piece in zip(reply.masks, reply.scores, rest):
            label = f"{len(colors) + 1}: " + ("empty" if score is None else f"{mask.mean():.1%}, {score:.2f}")
            colors[label] = "#{:02x}{:02x}{:02x}".format(*PALETTE[len(colors) % len(PALETTE)])
            text += [(SEG, label), (piece, None)]
        text.append(("\n", None))
    return text, colors


def build(model: Any, processor: Self1EProcessor, name: str, *, max_tiles: int) -> Any:
    """The page, a `gr.Blocks`. name: of the model."""
    import gradio as gr

    def answer(path: str | None, text: str, mode: str) -> Iterator[tuple]:
        """After every few prompts: overlay, answers, files, "8 of 30"."""
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        try:
            if path is None or not 0 < len(prompts) <= PROMPTS:
                raise UserError(f"Choose a photo and write 1 to {PROMPTS} prompts, one per line.")
            try:
                image = photo_of(path)
            except UserError:  # it names a file of this machine
                raise UserError("This file is no photo that can be read.") from None
            for prompt in prompts:
                check_prompt(prompt)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        replies: list[Reply] = []
        yield image, None, None, f"0 of {len(prompts)}"
        with tempfile.TemporaryDirectory(prefix="self1e_") as folder:
            output = Output(Path(folder), {}, overlays=False)
            for start in range(0, len(prompts), TOGETHER):
                some = prompts[start : start + TOGETHER]
                if mode == CHAT:
                    replies += model.chat(processor, image, some, max_tiles=max_tiles)
                else:
                    found = model.segment(processor, image, some, max_tiles=max_tiles)
                    replies += [Reply(x.text, x.mask[None], x.logits[None], [x.score]) for x in found]
                output.append([output.save(path, image, *pair) for pair in zip(some, replies[start:])])
                output.write_coco()
                made = [output.folder / "coco.json", *sorted(output.folder.glob("*.png"))]
                masks = [mask for reply in replies for mask in reply.masks]
                words, colors = marked(prompts, replies)
                answers = gr.HighlightedText(words, color_map=colors)
                drawing = overlay(image, masks) if masks else image
                yield drawing, answers, list(map(str, made)), f"{len(replies)} of {len(prompts)}"

    def cancelled(status: str) -> str:
        done, _, count = status.partition(" of ")
        return f"cancelled: {status} done" if done.isdigit() and done != count else status

    folder = files("self1e.apps") / "demo_examples"
    examples = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    # fmt: off
    with gr.Blocks(title="Self1E", analytics_enabled=False, delete_cache=(KEEP, KEEP)) as page:
        gr.Markdown(f"## Self1E\nA multimodal LLM that segments by itself. Model: {html.escape(name)}")
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Photo", type="filepath", image_mode=None, height=380, elem_id="photo",
                                 sources=["upload", "webcam", "clipboard"])
                prompts = gr.Textbox(label="Prompts, one per line", lines=3, max_lines=10, max_length=CHARACTERS,
                                     placeholder="the red car\nWhich of these can fly?", elem_id="prompts")
                mode = gr.Radio([SEGMENT, CHAT], value=SEGMENT, label="Mode")
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="run")
                    cancel = gr.Button("Cancel", elem_id="cancel")
            with gr.Column():
                result = gr.Image(label="Masks", format="png", interactive=False, height=380, elem_id="overlay",
                                  buttons=["fullscreen", "download"])
                status = gr.Markdown(elem_id="status")
                answers = gr.HighlightedText(label="Answers, with number, share of the photo and score of each mask",
                                             elem_id="answers")
                downloads = gr.Files(label="Masks, and all as COCO", interactive=False, height=200, elem_id="files")
        gr.Examples([[str(folder / name), "\n".join(lines)] for name, lines in examples.items()], [image, prompts],
                    cache_examples=False)
        work = run.click(answer, [image, prompts, mode], [result, answers, downloads, status], api_name="answer",
                         show_progress_on=result)
        run.click(None, js="() => document.querySelector('#overlay').scrollIntoView({block: 'nearest'})")
        stopped = cancel.click(None, cancels=[work], queue=False, api_visibility="private")
        stopped.then(cancelled, status, status, queue=False, api_visibility="private")
    # fmt: on
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and serve until Ctrl-C or SIGTERM, which end the process."""
    parser = argparse.ArgumentParser(prog="self1e demo", description=__doc__, allow_abbrev=False, formatter_class=Help)
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves every machine that can reach this one")
    parser.add_argument("--port", type=int, default=7860, help="of the page")
    parser.add_argument("--queue", type=int, default=16, help="requests that may wait; more are refused")
    parser.add_argument("--max_upload", default="30mb", help="larger files are refused")
    args = parser.parse_args(argv)
    if find_spec("gradio") is None:
        raise UserError("the demo needs Gradio: pip install 'self1e[demo]'")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    model, processor = load(args)
    name = "/".join(Path(args.model_weights or args.version).resolve().parts[-2:])
    with tempfile.TemporaryDirectory(prefix="self1e_demo_", ignore_cleanup_errors=True) as folder:
        # Gradio asks itself for its page: no proxy may stand between. It reads its own variables when imported.
        os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": f"{folder}/gradio"}
        tempfile.tempdir = folder
        import gradio as gr

        page = build(model, processor, name, max_tiles=args.max_tiles)
        page.queue(max_size=args.queue, default_concurrency_limit=1)
        try:
            page.launch(
                server_name=args.host, server_port=args.port, share=False, ssr_mode=False, quiet=True, css=CSS,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                footer_links=[], max_file_size=args.max_upload, prevent_thread_lock=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"no page at {args.host}:{args.port} ({error}); give another --port") from error
        print(f"Self1E is at http://{args.host}:{args.port} until Ctrl-C", flush=True)
        page.block_thread()  # which Ctrl-C ends
        removed = Path(folder).rename(f"{folder}.removed")  # so that a request can write nothing more there
    shutil.rmtree(removed, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)  # Python would wait for a request's thread, or torch abort in the midst of its work
