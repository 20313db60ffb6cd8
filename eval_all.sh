#!/usr/bin/env bash
# Purpose: gIoU and cIoU of a trained model on all 13 segmentation splits, beside the published figures where the data is whole.
# Command: bash eval_all.sh runs/my_run
#          bash eval_all.sh --version PATH/InternVL3-2B --model_weights PATH/published --exp_name my_run --eval_visualize
#          bash eval_all.sh runs/my_run --val_dataset "ReasonSeg|val||refcoco|unc|val" --num_processes 2
#          any flag of train_hf_ivl_seq.py may follow. Bare: the variables below.
# Cost:    one launch for all splits; 2B on one 80 GB GPU encodes each photo once for all its sentences.
# Result:  <log_base_dir>/<exp_name>/eval: <split>.json, <split>.jsonl, summary.md, summary.json. Expected: README, "Results".

VERSION=""         # model folder or hub id; empty: the run's own model
EXP_NAME=""        # results go to <log_base_dir>/<exp_name>/eval
MODEL_WEIGHTS=""   # empty: runs/<exp_name>/ckpt_model if it is there, else the version's own head
EXTRA=""           # any other flags
KIND=segmentation
USAGE='usage: bash eval_all.sh RUN | --version V --exp_name E [--model_weights W] [--val_dataset "SPLIT||SPLIT"]
                        [--num_processes N] [any flag of train_hf_ivl_seq.py]
Without arguments, set EXP_NAME at the top of eval_all.sh.'

source "$(dirname "${BASH_SOURCE[0]}")/scripts/evaluate.sh"
