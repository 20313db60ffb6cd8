"""Answers about your own photos, with a mask for every `[SEG]` in them, from the command line.

    self1e chat --version V --image a.jpg --prompt "Where is the red car? Why do you think so?" --output out/

The model writes its answer; the masks take one more pass over the whole text. Files, records and exit codes are those
of `self1e segment`; an answer without `[SEG]` has a record without masks.
"""

from collections.abc import Sequence

from self1e.apps.segment import Job, flags, run
from self1e.model.photos import photo_of


def prepare(processor, with_image: bool, job: Job) -> dict:
    return {"image": photo_of(job.path), "lengths": [1]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `self1e chat` with command line `argv`; returns the exit code."""
    parser = flags("chat", __doc__)
    parser.add_argument("--max_new_tokens", type=int, default=256, help="length limit of an answer")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts of a photo answered together")
    args = parser.parse_args(argv)
    options = {"max_new_tokens": args.max_new_tokens, "threshold": args.threshold, "max_tiles": args.max_tiles}
    options["conversations_per_forward"] = args.batch_size

    def ask(model, processor, photos):
        ((job, made),) = photos
        replies = model.chat(processor, made["image"], job.prompts, **options)
        for prompt, reply in zip(job.prompts, replies):
            print(f"{prompt}: {reply.text}")
        return [replies]

    return run(args, prepare, ask, {"max_new_tokens": args.max_new_tokens})
