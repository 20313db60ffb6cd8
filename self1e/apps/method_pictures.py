"""Draw what the parts of the method do to one photo: `self1e pictures`.

    self1e pictures --version runs/NAME/ckpt_model --image photo.jpg --prompt "the red circle" --output pictures

writes, in seconds on a CPU, three pictures into the folder:

    similarity.png   the query of the `[SEG]` token times the image side: the LLM's own image tokens, the
                     self-replicated features before refilling, the refilled features (the mask's logits)
    features.png     the first three principal components as red, green and blue: self-replicated features, the LLM's
                     residual, refilled features
    attention.png    per layer of the LLM, how much each image token attends to `[SEG]`, mean over heads

The checkpoint must hold the full method (`mask_features` is `rfa`).
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from self1e.apps.pictures import find_pictures
from self1e.errors import UserError
from self1e.flags import Parser, check_writable, told, uncollected
from self1e.model.prompts import check_prompt
from self1e.model.weights import checkpoint_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when the pictures are written. Errors are for `self1e.flags.guarded`."""
    parser = Parser(prog="self1e pictures", description=__doc__)
    add = parser.add_argument
    add(
        "--version",
        required=True,
        type=checkpoint_folder,
        help="a checkpoint of the full method, or the folder of its run",
    )
    add("--image", required=True, help="one photo")
    add("--prompt", required=True, help="what to segment")
    add("--output", type=Path, required=True, help="folder for the pictures")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the pictures need matplotlib: pip install 'self1e[plots]'")
    try:
        check_prompt(args.prompt)
        photo, *others = find_pictures([args.image], args.output)
        if others:
            raise ValueError(f"--image {args.image}: a folder with several pictures; name one of them")
        check_writable(args.output)
    except (UserError, ValueError, OSError) as error:
        parser.error(told(error))
    with uncollected(lasting=True):
        from self1e import Self1EForSegmentation, Self1EProcessor
        from self1e.apps.method_parts import compute_parts, draw
        from self1e.data.samples import SampleError, load_image

    try:
        image = load_image(photo)
    except SampleError as error:
        raise ValueError(error.cause) from error
    processor = Self1EProcessor.from_pretrained(args.version)
    model = Self1EForSegmentation.from_pretrained(args.version, attn_implementation="eager")
    draw(compute_parts(model, processor, image, args.prompt), image, args.prompt, args.output)
    print(f"similarity.png, features.png and attention.png are in {args.output}")
    return 0
