# Sourced by eval_all.sh and eval_vqas.sh, which set KIND, USAGE and the variables: starts `self1e eval KIND`, by
# torchrun where there are several processes. --num_processes: one per GPU unless it says another number.

set -euo pipefail
python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ $# -eq 0 ]; then
    if [ -z "$EXP_NAME" ]; then
        echo "$USAGE" >&2
        exit 2
    fi
    # shellcheck disable=SC2086  # EXTRA holds several words
    set -- ${VERSION:+--version "$VERSION"} --exp_name "$EXP_NAME" ${MODEL_WEIGHTS:+--model_weights "$MODEL_WEIGHTS"} $EXTRA
fi

processes=""
args=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) exec "$python" -m self1e eval "$KIND" --help ;;
        --num_processes) processes=${2:?--num_processes needs a number}; shift 2 ;;
        --num_processes=*) processes=${1#*=}; shift ;;
        --device=cpu) processes=${processes:-1}; args+=("$1"); shift ;;
        --device) [ "${2:-}" != cpu ] || processes=${processes:-1}; args+=("$1"); shift ;;
        *) args+=("$1"); shift ;;
    esac
done
if [ -z "$processes" ]; then
    processes=$("$python" -c "import torch; print(max(1, torch.cuda.device_count()))")
fi
case $processes in
    '' | *[!0-9]* | 0) echo "--num_processes $processes: a number from 1 on was expected" >&2; exit 2 ;;
    1) exec "$python" -m self1e eval "$KIND" "${args[@]}" ;;
esac
# --standalone takes a free port. torchrun passes these signals on, but not the end of the shell above it, and leaves
# every rank the time to finish its photo.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m self1e eval "$KIND" "${args[@]}"
