"""Fine-tune on your own photos, then look at a mask.

    python examples/finetune_own_data.py --version V --data mine/train.csv --output runs/mine [training flags ...]

`train.csv` has the columns `image,mask,prompt`: a photo, a PNG whose foreground is above 0, and what it shows ("the
red car"); files are named relative to it. Check it first: `python scripts/check_data.py mine/train.csv`. The first row
is asked again at the end: `<output>/predictions` holds its mask. Other flags go to the training program, e.g.
`--epochs 3 --lr 2e-5`; on several GPUs call that program itself with `deepspeed`.
"""

import argparse
import csv
import sys
from pathlib import Path

from self1e import predict, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--version", required=True, help="base or trained model, folder or hub id")
parser.add_argument("--data", type=Path, required=True, help="CSV with image,mask,prompt")
parser.add_argument("--output", type=Path, required=True)
args, training_flags = parser.parse_known_args()

code = train.main([
    "--version", args.version, "--dataset", "custom", "--custom_data", str(args.data), "--mixture", "exact",
    "--use_llm_lora", "--optimize_vision", "--use_vision_lora", "--no_eval",
    "--exp_name", args.output.name, "--log_base_dir", str(args.output.parent), *training_flags,
])  # fmt: skip
if code:
    sys.exit(code)

with open(args.data, encoding="utf-8-sig", newline="") as file:
    row = next(csv.DictReader(file))
sys.exit(predict.main([
    "--version", str(args.output / "ckpt_model"), "--image", str(args.data.parent / row["image"]),
    "--prompt", row["prompt"], "--output", str(args.output / "predictions"),
]))  # fmt: skip
