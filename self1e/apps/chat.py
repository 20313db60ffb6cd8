"""Answers about your own photos, with a mask for every `[SEG]` in them, from the command line.

    self1e chat --version V --image a.jpg --prompt "Where is the red car? Why do you think so?" --output out/

The model writes its answer; the masks take one more pass over the whole text. Files, records and exit codes are those
of `self1e segment`; an answer without `[SEG]` has a record without masks.
"""

from collections.abc import Sequence

from self1e.apps.segment import flags, run
from self1e.model.processor import HIGH_RES_TILES


def main(argv: Sequence[str] | None = None) -> int:
    """Run `self1e chat` with command line `argv`; returns the exit code."""
    parser = flags("chat", __doc__)
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit of an answer")
    args = parser.parse_args(argv)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "threshold": args.threshold,
        "max_tiles": HIGH_RES_TILES if args.high_res else 1,
        "conversations_per_forward": args.batch_size,
    }

    def ask(model, processor, images, prompts):
        photos = [image for image, asked in zip(images, prompts) for _ in asked]
        questions = [prompt for asked in prompts for prompt in asked]
        replies = model.chat(processor, photos, questions, **options) if photos else []
        for question, reply in zip(questions, replies):
            print(f"{question}: {reply.text}")
        remaining = iter(replies)
        return [[next(remaining) for _ in asked] for asked in prompts]

    return run(parser, args, ask, {"max_new_tokens": args.max_new_tokens})
