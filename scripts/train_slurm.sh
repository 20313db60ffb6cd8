#!/usr/bin/env bash
# Purpose: training or evaluation on the nodes of a Slurm cluster. A template: edit the lines marked <--.
# Command: sbatch scripts/train_slurm.sh                                            the README's training command
#          sbatch --nodes=1 scripts/train_slurm.sh eval segmentation                then the 13 splits of the same run
#          sbatch --nodes=1 scripts/train_slurm.sh eval vqa --dynamic               or any other command of `self1e`
# Cost:    as on one node with as many GPUs; the global batch is batch_size x grad_accumulation_steps x GPUs, so lower
#          grad_accumulation_steps as nodes are added to keep the recipe's 5 x 8 x 8 = 320 photos per step.
# Result:  RUN/ckpt_model, RUN/eval, RUN/eval_vqa on the shared file system. Slurm warns the ranks ten minutes before
#          the time is up; a training saves a checkpoint after its next step, an evaluation stops before its next photo,
#          and both leave the mark RUN/requeue, by which this script puts the job back into the queue.
#
#SBATCH --job-name=self1e
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8            # one process per GPU, started by srun itself: signals then reach every rank
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0                        # all memory of the nodes
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@600              # seconds before the time is up; longer than one step and one checkpoint take
#SBATCH --requeue
#SBATCH --open-mode=append             # a requeued job writes on behind what the log already holds
#SBATCH --output=%x-%j.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
RUN=${RUN:-runs/self1e_2b}             # <-- the run's folder
source .venv/bin/activate              # <-- your environment
export NCCL_SOCKET_IFNAME=^lo,docker   # <-- your network
if [ $# -eq 0 ]; then                  # <-- your training
    set -- train --config configs/self1e_2b.yaml --version PATH/InternVL3-2B --grad_accumulation_steps 4 --auto_resume
fi
# Each node builds the data's index once and shares it among its ranks and workers.
export SELF1E_CACHE=${SELF1E_CACHE:-$HOME/.cache/self1e}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS

rm -f "$RUN/requeue"                    # of an earlier job
code=0
# srun does not take --cpus-per-task over from sbatch; --kill-on-bad-exit ends the other ranks when one has failed.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank \
    python -m self1e "$@" --log_base_dir "$(dirname "$RUN")" --exp_name "$(basename "$RUN")" || code=$?

if [ -e "$RUN/requeue" ]; then         # stopped on request; the same command continues
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
