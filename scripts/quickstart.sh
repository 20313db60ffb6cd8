#!/usr/bin/env bash
# Purpose: see Self1E learn to segment, from an empty folder: environment, a tiny InternVL3 in the original layout,
#          synthetic scenes in the real formats, training with DeepSpeed, evaluation of held-out scenes, a mask.
# Command: bash scripts/quickstart.sh [OUTPUT_FOLDER]
# Cost:    the installation once (6.4 GB with PyTorch's CUDA build, into .venv or SELF1E_VENV; to have the CPU build, put
#          it into that environment first, by the command that pytorch.org names), then 6 to 7 minutes on 2 CPU cores.
# Result:  cIoU of held-out refcoco-style scenes, 0.87 seen, at least 0.5, pictures, and the command that segments one.

set -euo pipefail
output=$(realpath -m "${1:-quickstart}")
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ -n "$(ls -A "$output" 2>/dev/null)" ] && [ ! -e "$output/.quickstart" ]; then
    echo "$output holds files that are not of the quickstart; name another folder" >&2
    exit 2
fi
use_environment -r requirements.txt -e .
output=$(realpath -m --relative-base="$PWD" "$output") # short in what is printed, where it lies in this folder

started=$SECONDS
export SELF1E_CACHE="$output/cache" TOKENIZERS_PARALLELISM=false
processes=$(($(nproc) > 1 ? 2 : 1))
export OMP_NUM_THREADS=$(($(nproc) / processes)) DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
run=$output/runs/shapes
mkdir -p "$output"
touch "$output/.quickstart" # what this script made, and may remove
rm -rf "$output/base" "$output/shapes" "$run"

echo "== 1/3  a tiny InternVL3 and synthetic scenes"
self1e make-tiny "$output/base"
self1e make-shapes "$output/shapes" --simple --size 112 --val 50

echo "== 2/3  training, 1,200 steps"
torchrun --standalone --nproc_per_node "$processes" train_hf_ivl_seq.py --config configs/quickstart.yaml --batch_size $((8 / processes)) \
    --version "$output/base" --dataset_dir "$output/shapes/dataset" --data_dir "$output/shapes/data" --no_eval \
    --exp_name shapes --log_base_dir "$output/runs"

echo "== 3/3  evaluation of scenes that were held out"
bash eval_all.sh "$run" --dataset_dir "$output/shapes/dataset" --val_dataset "refcoco|unc|testA" --eval_visualize --num_processes "$processes"

# A sentence of middling IoU, from the evaluation's own record.
python - "$run" "$output" "$((SECONDS - started))" <<'PYTHON'
import json, os, shlex, sys
from pathlib import Path

run, output, seconds = sys.argv[1:]
units = [json.loads(line) for line in Path(run, "eval/refcoco_unc_testA.jsonl").read_text().splitlines()]
ciou = json.loads(Path(run, "eval/refcoco_unc_testA.json").read_text())["ciou"]
found = sorted((unit["I"] / unit["U"], unit["image"], unit["text"]) for unit in units if unit["I"])
iou, image, text = found[len(found) // 2]
phrase = text.removeprefix("What is ").split(" in this image?")[0]
photo = f"{output}/shapes/dataset/refer_seg/images/mscoco/images/train2014/{image}"
command = ["self1e", "segment", "--version", run, "--image", photo, "--prompt", phrase, "--output", f"{output}/masks"]
print(f"\ncIoU of held-out scenes: {ciou:.3f} (at least 0.5 expected), {seconds} s after the installation")
print(f"look at {run}/curves.png, and at {run}/eval/refcoco_unc_testA/overview.png, the worst sentences first")
activate = f"{os.path.relpath(os.environ['VIRTUAL_ENV'])}/bin/activate"
print(f"in {Path.cwd()} this writes a mask, whose IoU with its annotation is {iou:.2f}:\n  source {activate}\n  {shlex.join(command)}")
sys.exit(ciou < 0.5)
PYTHON
