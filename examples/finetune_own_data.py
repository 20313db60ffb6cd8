"""Fine-tune on your own photos: check them, train, evaluate, and segment a photo the model has not seen.

    python examples/finetune_own_data.py --version V --data mine/train.csv --val mine/val.csv --output runs/mine

A CSV has the columns `image,mask,prompt`: a photo, a PNG whose foreground is above 0, and what it shows ("the red
car"); files are named relative to it (more in the README, "Own data"). The recipe is `configs/small.yaml`, for
hundreds of photos; further flags go to the training program and override it, such as `--epochs 3`. On several
GPUs call that program itself with `deepspeed`.

Below OUTPUT: `train_sheet.png` and `val_sheet.png` to look at, `ckpt_model`, with `--val` also `eval/summary.md`, and
`predictions`: the mask of the first row of `--val` (without one, of `--data`).
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from self1e.apps import check_data, segment  # noqa: E402
from self1e.training import train  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--version", required=True, help="base or trained model, folder or hub id")
parser.add_argument("--data", type=Path, required=True, help="CSV to train on")
parser.add_argument("--val", type=Path, help="CSV of held-out photos, evaluated while and after training")
parser.add_argument("--output", type=Path, required=True)
args, flags = parser.parse_known_args()

for name, table in {"train": args.data, "val": args.val}.items():
    if table and check_data.main([str(table), "--output", str(args.output / f"{name}_sheet.png")]):
        sys.exit(1)

evaluation = ["--val_dataset", f"custom|{args.val}"] if args.val else ["--no_eval"]
code = train.main([
    "--config", str(ROOT / "configs/small.yaml"), "--version", args.version,
    "--dataset", "custom", "--custom_data", str(args.data), *evaluation,
    "--exp_name", args.output.name, "--log_base_dir", str(args.output.parent), *flags,
])  # fmt: skip
if code:
    sys.exit(code)

asked = args.val or args.data
with open(asked, encoding="utf-8-sig", newline="") as file:
    row = next(csv.DictReader(file))
sys.exit(segment.main([
    "--version", str(args.output / "ckpt_model"), "--image", str(asked.parent / row["image"]),
    "--prompt", row["prompt"], "--output", str(args.output / "predictions"),
]))  # fmt: skip
