#!/usr/bin/env bash
# Purpose: answer and score the VQA benchmarks: does the model still answer questions after learning to segment?
# Command: bash eval_vqas.sh --version OpenGVLab/InternVL3-2B --exp_name my_run --dynamic
#          bash eval_vqas.sh --version BASE --model_weights none runs/my_run/ckpt_model --exp_name my_run --dynamic
#          (base and fine-tuned side by side); all flags: --help. Bare: the variables below.
# Data:    ./data in InternVL's layout (docs/vqa.md, section Benchmarks).
# Result:  <log_base_dir>/<exp_name>/eval_vqa/summary.md and .json; exit code 1 when a benchmark failed, 2 for wrong usage.

VERSION=""         # model folder or hub id
EXP_NAME=""        # results go to <log_base_dir>/<exp_name>/eval_vqa
MODEL_WEIGHTS=""   # empty: runs/<exp_name>/ckpt_model if it is there, else the version's own
DATASETS=""        # empty: all; or names separated by blanks
EXTRA="--dynamic"  # any other flags

set -euo pipefail
python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Ctrl-C ends the counting of the GPUs without a traceback.
gpus="import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); import torch; print(max(1, torch.cuda.device_count()))"

if [ $# -eq 0 ]; then
    if [ -z "$VERSION" ] || [ -z "$EXP_NAME" ]; then
        echo "usage: bash eval_vqas.sh --version V --exp_name E [--model_weights W] [--datasets \"NAME ...\"]" \
            "[--data_dir ./data] [--dynamic] [--num_processes N] [--score_only] [--help]" >&2
        echo "Without arguments, set VERSION and EXP_NAME at the top of $0." >&2
        exit 2
    fi
    # shellcheck disable=SC2086  # EXTRA holds several words
    set -- --version "$VERSION" --exp_name "$EXP_NAME" ${MODEL_WEIGHTS:+--model_weights "$MODEL_WEIGHTS"} \
        ${DATASETS:+--datasets "$DATASETS"} $EXTRA
fi

processes=""
device="auto"
args=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) exec "$python" -m self1e.evaluation.vqa --help ;;
        --num_processes) processes=${2:?--num_processes needs a number}; shift 2 ;;
        --num_processes=*) processes=${1#*=}; shift ;;
        --device) device=${2:?--device needs a value}; args+=("$1" "$2"); shift 2 ;;
        *) args+=("$1"); shift ;;
    esac
done
if [ -z "$processes" ]; then
    processes=1
    if [ "$device" != cpu ]; then
        processes=$("$python" -c "$gpus")
    fi
fi
case $processes in
    '' | *[!0-9]* | 0) echo "--num_processes $processes: a number from 1 on was expected" >&2; exit 2 ;;
esac

if [ "$processes" -gt 1 ]; then # --standalone takes a free port
    exec "$python" -m self1e launch --standalone --nproc_per_node "$processes" -m self1e.evaluation.vqa "${args[@]}"
fi
exec "$python" -m self1e.evaluation.vqa "${args[@]}"
