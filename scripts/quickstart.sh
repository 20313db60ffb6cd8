#!/usr/bin/env bash
# Purpose: see Self1E learn to segment, from an empty folder: environment, a tiny InternVL3 in the original layout,
#          synthetic scenes in the real formats, training with DeepSpeed, evaluation of held-out scenes, a picture.
# Command: bash scripts/quickstart.sh [OUTPUT_FOLDER]
# Cost:    the installation (minutes, once), then 6 to 7 minutes on 2 CPU cores; no GPU, no network but the package index.
# Result:  cIoU of held-out refcoco-style scenes, 0.87 seen, at least 0.5, and the path of a picture, printed at the end.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
output=$(realpath -m "${1:-quickstart}")
use_environment -r requirements.txt -e .

started=$SECONDS
export SELF1E_CACHE="$output/cache" TOKENIZERS_PARALLELISM=false
processes=$(($(nproc) > 1 ? 2 : 1))
export OMP_NUM_THREADS=$(($(nproc) / processes)) DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""
split="refcoco|unc|testA"
rm -rf "$output/base" "$output/shapes" "$output/runs"

echo "== 1/3  a tiny InternVL3 and synthetic scenes"
self1e make-tiny "$output/base"
self1e make-shapes "$output/shapes" --simple --size 112 --val 50

echo "== 2/3  training, with validation, and evaluation of scenes that were held out"
torchrun --standalone --nproc_per_node "$processes" train_hf_ivl_seq.py --config configs/quickstart.yaml --batch_size $((8 / processes)) \
    --version "$output/base" --dataset_dir "$output/shapes/dataset" --data_dir "$output/shapes/data" \
    --exp_name shapes --log_base_dir "$output/runs"

echo "== 3/3  a picture"
python scripts/quickstart_picture.py --model "$output/runs/shapes/ckpt_model" --dataset_dir "$output/shapes/dataset" \
    --split "$split" --output "$output/picture.png"

ciou=$(python -c "import json, sys; print(round(json.load(open(sys.argv[1]))['ciou'], 3))" "$output/runs/shapes/eval/${split//|/_}.json")
echo
echo "cIoU of held-out scenes: $ciou (at least 0.5 expected), $((SECONDS - started)) s after the installation"
echo "picture: $output/picture.png; curves: $output/runs/shapes/curves.png"
photo=$(find "$output/shapes/dataset/refer_seg/images" -name "*.jpg" | sort | sed -n 1p)
echo "go on with this environment and model:"
echo "  source $VIRTUAL_ENV/bin/activate"
echo "  self1e segment --version $output/runs/shapes/ckpt_model --image $photo --prompt 'the red circle' --output $output/masks"
python -c "import sys; sys.exit(float(sys.argv[1]) < 0.5)" "$ciou"
