"""Masks for your own pictures, from the command line.

    self1e segment --version V --image a.jpg photos/ --prompt "the red car" "Which one flies?" --output out/
    self1e chat --version V --image a.jpg --prompt "Where is the red car? Why do you think so?" --output out/

Cost: one forward pass for `--batch_size` prompts; the 2B model's weights take 4 GB in bf16 (GPU), 8 GB in fp32 (CPU).

Written to `--output`, for each picture and prompt: `<name>.png` (the mask, 0 or 255, at the picture's upright size),
`<name>_overlay.jpg`, with `--save_logits` `<name>.npy` (float32, before the resize), and one `predictions.json`: a
list with one entry per mask, in COCO's result format (`segmentation` is RLE, `bbox` is x, y, width, height in pixels,
`area` in pixels, `score` is the mean foreground probability over the mask, 0 for an empty one; `image_id` and
`category_id` count pictures and prompts from 1) plus `image`, `width`, `height`, `prompt`, `text`, `seconds` of the
model and the names of its files. Chat also writes `answers.json`, one entry per picture and prompt, because an answer
may hold no mask or several. `self1e export` turns the folder into a COCO data set or tasks for Label Studio.

Exit code: 0; 1 when a picture could not be read (it is reported and skipped) or the run broke off (what was done
before is on disk and in predictions.json); 2 for wrong arguments; 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from self1e.apps.loading import add_model_arguments
from self1e.apps.pictures import find_pictures, read_prompts
from self1e.errors import UserError
from self1e.flags import Parser, between, check_writable, counted, told, uncollected, whole

SHOWN, LONGEST = 10, 80  # answers of chat that are printed, and characters of their prompts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    chat = argv is not None and list(argv[:2]) == ["--mode", "chat"]
    parser = Parser(prog=f"self1e {'chat' if chat else 'segment'}", description=__doc__)
    add = parser.add_argument
    add_model_arguments(parser)
    # fmt: off
    # A flag is one line, and where that is too long its help another.
    add("--image", nargs="+", required=True, metavar="PATH", help="pictures, or folders of them")
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="asked of every picture, each by itself")
    add("--prompts_file", type=Path, metavar="FILE", help="more prompts, one per line")
    add("--output", type=Path, required=True, metavar="FOLDER", help="files of the same names are replaced")
    add("--mode", choices=("segment", "chat"), default="segment",
        help="segment: one mask per prompt, the answer is given; chat: the model writes, one mask for every [SEG]")
    add("--prompt_kind", choices=("auto", "phrase", "sentence"),
        help="how segment asks; auto (default): what ends with . ? or ! is a sentence")
    add("--threshold", type=between(0, 1), default=0.5,
        help="foreground probability above which a pixel belongs to the mask")
    add("--max_new_tokens", type=whole(1), help="length limit of chat's answers; default: 256")
    add("--batch_size", type=whole(1), default=8, help="prompts in one forward pass")
    add("--save_logits", action="store_true", help="also <name>.npy: float32 logits before the resize")
    # fmt: on
    args = parser.parse_args(argv)
    idle = "prompt_kind" if args.mode == "chat" else "max_new_tokens"
    if getattr(args, idle) is not None:
        parser.error(f"--{idle} does nothing with --mode {args.mode}; leave it out")
    try:
        args.prompts = args.prompt + (read_prompts(args.prompts_file) if args.prompts_file else [])
        if not args.prompts:
            raise ValueError("no prompt: give --prompt or --prompts_file")
        args.pictures = find_pictures(args.image, args.output)
        from self1e.model.prompts import check_prompt

        for prompt in args.prompts:
            check_prompt(prompt)
        check_writable(args.output)
    except (UserError, ValueError, OSError) as error:
        parser.error(told(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command line `argv`; returns the exit code. Errors are for `self1e.flags.guarded`."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    with uncollected(lasting=True):
        import torch

        from self1e.apps.loading import load
        from self1e.apps.results import Results
        from self1e.apps.segmenting import predict
        from self1e.model.processor import HIGH_RES_TILES

    model, processor = load(args.version, args.model_weights, device=args.device, dtype=args.dtype, bits=args.quantize)
    results = Results(args.output, save_logits=args.save_logits, answers=args.mode == "chat")
    try:
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
            max_new_tokens=args.max_new_tokens or 256,
            is_sentence={"phrase": False, "sentence": True}.get(args.prompt_kind),
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of GPU memory, try a smaller --batch_size or --quantize 8 ({error})") from error
    pictures = len(args.pictures) - len(unreadable)
    for answer in (results.answers or [])[:SHOWN]:
        print(f"{answer['image']}, {answer['prompt'][:LONGEST]!r}: {answer['text']}")
    masks, empty = counted(len(results.records), "mask"), sum(not record["area"] for record in results.records)
    masks += f" ({empty:,} empty)" if empty else ""
    shown = "; *_overlay.jpg show them on the pictures" if results.records else ""
    print(f"{masks} of {counted(pictures, 'picture')} in {args.output}{shown}")
    if unreadable:
        print(f"{counted(len(unreadable), 'picture')} could not be read, see above", file=sys.stderr)
    return 1 if unreadable else 0
