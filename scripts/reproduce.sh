#!/usr/bin/env bash
# Purpose: from nothing to the paper's table: data, training, 13 segmentation splits, 11 VQA benchmarks, one table.
# Command: bash scripts/reproduce.sh OpenGVLab/InternVL3-2B                               (configs/self1e_2b.yaml)
#          bash scripts/reproduce.sh OpenGVLab/InternVL3-2B configs/self1e_seg_2b.yaml my_run
# Cost:    about 250 GB of disk with the archives; one epoch of 580,000 samples on the GPUs of this node.
# Result:  the table of `self1e score`. Expected: README, "Results". Not run at full size with this code yet.
# Every step continues where it stopped when the same command runs again.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 1 ]; then
    echo "usage: bash scripts/reproduce.sh VERSION [CONFIG] [EXP_NAME]" >&2
    exit 2
fi
version=$1 config=${2:-configs/self1e_2b.yaml} name=${3:-reproduction}

bash scripts/get_data.sh sem_seg refer_seg ReasonSeg vqa splits benchmarks
self1e check-data dataset || echo "continuing with what is there"  # ReasonSeg's test photos are fetched by hand
deepspeed train_hf_ivl_seq.py --config "$config" --version "$version" --exp_name "$name" --auto_resume --no_eval
bash eval_all.sh "runs/$name"
bash eval_vqas.sh "runs/$name" --dynamic
self1e score "runs/$name"
