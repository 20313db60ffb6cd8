#!/usr/bin/env bash
# Purpose: gIoU and cIoU of a trained model on all 13 segmentation splits, beside the published figures.
# Command: bash eval_all.sh --version PATH/InternVL3-2B --exp_name my_run                      (uses runs/my_run/ckpt_model)
#          bash eval_all.sh --version PATH/InternVL3-2B --model_weights PATH/published --exp_name my_run --eval_visualize
#          bash eval_all.sh --version V --exp_name E --val_dataset "ReasonSeg|val||refcoco|unc|val" --num_processes 2
#          any flag of train_hf_ivl_seq.py may follow. Bare: the variables below.
# Cost:    one launch for all splits; 2B on one 80 GB GPU encodes each photo once for all its sentences.
# Result:  <log_base_dir>/<exp_name>/eval: <split>.json, <split>.jsonl, summary.md, summary.json. Expected: README, "Results".

VERSION=""         # model folder or hub id
EXP_NAME=""        # results go to <log_base_dir>/<exp_name>/eval
MODEL_WEIGHTS=""   # empty: runs/<exp_name>/ckpt_model if it is there, else the version's own head
EXTRA=""           # any other flags

set -euo pipefail
python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Ctrl-C ends the counting of the GPUs without a traceback.
gpus="import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); import torch; print(max(1, torch.cuda.device_count()))"

if [ $# -eq 0 ]; then
    if [ -z "$VERSION" ] || [ -z "$EXP_NAME" ]; then
        echo "usage: bash eval_all.sh --version V --exp_name E [--model_weights W] [--val_dataset \"SPLIT||SPLIT\"]" \
            "[--num_processes N] [any flag of train_hf_ivl_seq.py]" >&2
        echo "Without arguments, set VERSION and EXP_NAME at the top of $0." >&2
        exit 2
    fi
    # shellcheck disable=SC2086  # EXTRA holds several words
    set -- --version "$VERSION" --exp_name "$EXP_NAME" ${MODEL_WEIGHTS:+--model_weights "$MODEL_WEIGHTS"} $EXTRA
fi

processes=""
which=(--eval_all_datasets)
args=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) exec "$python" "$root/train_hf_ivl_seq.py" --help ;;
        --num_processes) processes=${2:?--num_processes needs a number}; shift 2 ;;
        --num_processes=*) processes=${1#*=}; shift ;;
        --val_dataset | --val_dataset=*) which=(); args+=("$1"); shift ;;
        *) args+=("$1"); shift ;;
    esac
done
if [ -z "$processes" ]; then
    processes=$("$python" -c "$gpus")
fi
case $processes in
    '' | *[!0-9]* | 0) echo "--num_processes $processes: a number from 1 on was expected" >&2; exit 2 ;;
esac

program=("$root/train_hf_ivl_seq.py" --eval_only ${which[@]+"${which[@]}"} "${args[@]}")
if [ "$processes" -gt 1 ]; then # --standalone takes a free port
    exec "$python" -m self1e launch --standalone --nproc_per_node "$processes" "${program[@]}"
fi
exec "$python" "${program[@]}"
