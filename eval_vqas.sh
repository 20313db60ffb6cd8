#!/usr/bin/env bash
# Purpose: answer and score the VQA benchmarks: does the model still answer questions after learning to segment?
# Command: bash eval_vqas.sh runs/my_run --dynamic
#          bash eval_vqas.sh --version BASE --exp_name base --dynamic, to compare with by `self1e score runs/base runs/my_run`
#          All flags: --help. Bare: the variables below.
# Data:    ./data in InternVL's layout (data/README.md).
# Result:  <log_base_dir>/<exp_name>/eval_vqa/summary.md and .json; exit code 1 when a benchmark failed, 2 for wrong usage.

VERSION=""         # model folder or hub id; empty: the run's own model
EXP_NAME=""        # results go to <log_base_dir>/<exp_name>/eval_vqa
MODEL_WEIGHTS=""   # empty: runs/<exp_name>/ckpt_model if it is there, else the version's own
EXTRA="--dynamic"  # any other flags, such as --datasets "pope mme"
KIND=vqa
USAGE='usage: bash eval_vqas.sh RUN | --version V --exp_name E [--model_weights W] [--datasets "NAME ..."]
                         [--data_dir ./data] [--dynamic] [--num_processes N] [--score_only] [--help]
Without arguments, set EXP_NAME at the top of eval_vqas.sh.'

source "$(dirname "${BASH_SOURCE[0]}")/scripts/evaluate.sh"
