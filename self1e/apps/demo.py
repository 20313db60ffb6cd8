"""A web page to try a model: a picture, prompts, masks.

    pip install 'self1e[demo]'
    self1e demo --version runs/exp/ckpt_model        # then open http://127.0.0.1:7860

Serves this machine only unless `--host` says otherwise, one request at a time, at most `--queue` waiting. Neither the
server nor its page contacts any other machine. Uploads and results lie in one temporary folder; a request's files go
after an hour, all of them when the server ends (Ctrl-C, SIGTERM, or the end of its terminal).
"""

import argparse
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from self1e.apps.loading import add_model_arguments
from self1e.flags import Parser, between, uncollected, whole


def upload_size(text: str) -> str:
    """A flag's type: a file size such as 30mb."""
    if not re.fullmatch(r"[1-9]\d*(kb|mb|gb)", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500kb or 30mb")
    return text.lower()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="self1e demo", description=__doc__)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 serves every machine that can reach this one")
    add("--port", type=whole(1, 65535), default=7860)
    add("--queue", type=whole(1), default=16, help="requests that may wait; more are refused")
    add("--max_megapixels", type=between(0), default=40.0, help="larger pictures are refused")
    add("--max_upload", type=upload_size, default="30mb", help="larger files are refused")
    add("--max_disk", type=upload_size, default="5gb", help="space for uploads, and as much for results; then refused")
    add("--max_prompts", type=whole(1), default=200, help="more prompts in one request are refused")
    add("--max_prompt_length", type=whole(1), default=1000, help="longer prompts are refused, characters")
    return parser.parse_args(argv)


def check_port(host: str, port: int) -> None:
    """Raise OSError where this address cannot be served, before a model is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"--host {host} --port {port}: {reason}; choose another, such as --port {port % 65535 + 1}"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and serve until Ctrl-C, SIGTERM or SIGHUP; returns the exit code."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    if find_spec("gradio") is None:
        raise ImportError("the demo needs Gradio: pip install 'self1e[demo]'")
    check_port(args.host, args.port)
    stopped = threading.Event()
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [each for each in ends if signal.getsignal(each) != signal.SIG_IGN]  # under nohup it is to go on
    previous = {each: signal.signal(each, lambda *_: stopped.set()) for each in heard}
    try:
        with tempfile.TemporaryDirectory(prefix="self1e_demo_", ignore_cleanup_errors=True) as folder:
            return serve(args, Path(folder), stopped)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the demo has stopped; its temporary files are gone") from None
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def serve(args: argparse.Namespace, folder: Path, stopped: threading.Event) -> int:
    """Load the model and serve the page until `stopped`; whatever it writes lies in `folder`."""
    # Gradio reads these when it is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    with uncollected(lasting=True):
        import gradio as gr
        from starlette.middleware import Middleware

        from self1e.apps.gate import Gate, size_in_bytes
        from self1e.apps.loading import load
        from self1e.apps.page import CSS, Demo, Limits, build

    model, processor = load(args.version, args.model_weights, device=args.device, dtype=args.dtype, bits=args.quantize)
    results = folder / "results"
    results.mkdir()
    space = size_in_bytes(args.max_disk)
    limits = Limits(
        megapixels=args.max_megapixels, prompts=args.max_prompts, characters=args.max_prompt_length, disk=space
    )
    gate = Middleware(Gate, folder / "uploads", size_in_bytes(args.max_upload), space)
    demo = Demo(model, processor, results, limits)
    name = Path(args.model_weights or args.version).resolve()
    page = build(
        demo, name.parent.name if name.name == "ckpt_model" else name.name, queue=args.queue, high_res=args.high_res
    )
    page.launch(
        server_name=args.host, server_port=args.port, share=False, ssr_mode=False, show_error=False, css=CSS,
        max_file_size=args.max_upload, theme=gr.themes.Default(font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"]), footer_links=[], quiet=True, prevent_thread_lock=True,
        app_kwargs={"middleware": [gate]},
    )  # fmt: skip
    print(f"Self1E is at http://{args.host}:{args.port} until Ctrl-C", flush=True)
    try:
        while not stopped.wait(0.5):  # a wait without end would not see Ctrl-C on Windows
            pass
    finally:
        page.close(verbose=False)
    return 0
