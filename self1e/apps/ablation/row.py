"""Train one row with the ordinary training program and measure it, in a process of its own.

    python -m self1e.apps.ablation.row FOLDER BENCHMARK FLAGS...

FOLDER gets the run, `units.jsonl` (one line per sentence) and `curve.json`. An empty BENCHMARK makes it the warm-up
that all rows share: it trains a head of its own and is not measured.
"""

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.ablation.measure import measure
from self1e.files import write_json, write_text
from self1e.model.head import HEADS, AmplifiedHead, ImageSide
from self1e.training.run import main as train

LOSSES = ("ce", "mask_bce", "mask_dice")


class SharedHead(AmplifiedHead):
    """The head of the shared warm-up: the full method, but that every other row's auxiliary mask is the baseline's.

    Every mask has the same losses, so that neither end of the suite `method` starts behind the other.
    """

    def forward(self, image: Tensor, seg: Tensor, sides: Sequence[ImageSide]) -> tuple[Tensor, Tensor | None]:
        mask, auxiliary = super().forward(image, seg, sides)
        assert auxiliary is not None
        baseline = F.interpolate(self.logits(image, seg), tuple(auxiliary.shape[2:]), mode="bilinear")
        odd = torch.arange(len(image), device=image.device) % 2 == 1
        return mask, torch.where(odd[:, None, None, None], baseline, auxiliary)


def curve(run: Path) -> list[dict[str, Any]]:
    """Step and loss terms at every logged step of a run, from the Trainer's own record."""
    (state,) = run.glob("checkpoints/checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return [{name: entry[name] for name in ("step", *LOSSES)} for entry in history if "mask_dice" in entry]


def main(argv: Sequence[str]) -> int:
    """Train and measure; returns the training program's exit code when that is not 0."""
    folder, benchmark, *flags = argv
    if not benchmark:
        HEADS["rfa"] = SharedHead  # its parameters have the names of the full method's
    code = train([*flags, "--exp_name", "run", "--log_base_dir", folder])
    if code:
        return code
    write_json(Path(folder, "curve.json"), curve(Path(folder, "run")))
    if benchmark:
        checkpoint = Path(folder, "run", "ckpt_model")
        torch.set_num_threads(1)  # the same digits, however many rows are trained at a time
        processor = Self1EProcessor.from_pretrained(checkpoint)
        model = Self1EForSegmentation.from_pretrained(checkpoint, dtype=torch.float32)
        lines = [json.dumps(unit) + "\n" for unit in measure(model, processor, Path(benchmark))]
        write_text(Path(folder, "units.jsonl"), "".join(lines))
    return 0


if __name__ == "__main__":
    gc.freeze()  # as `flags.uncollected` does for programs that import later
    raise SystemExit(main(sys.argv[1:]))
