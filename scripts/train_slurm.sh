#!/usr/bin/env bash
# Purpose: the README's training command on several nodes of a Slurm cluster. A template: edit the lines marked <--.
# Command: sbatch scripts/train_slurm.sh
# Cost:    as on one node with as many GPUs; the global batch is batch_size x grad_accumulation_steps x GPUs, so lower
#          grad_accumulation_steps as nodes are added to keep the recipe's 5 x 8 x 8 = 320 photos per step.
# Result:  runs/<exp_name>/ckpt_model on the shared file system. Slurm warns the ranks ten minutes before the time is
#          up; they save a checkpoint after their next step and exit with 75, and the job puts itself back into the
#          queue. A job that was pre-empted or requeued continues from its last checkpoint in the same way.
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
source .venv/bin/activate              # <-- your environment
export NCCL_SOCKET_IFNAME=^lo,docker   # <-- your network
export OMP_NUM_THREADS=8
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True   # batches differ in size; without it memory fragments
# Each node builds the data's index once and shares it among its ranks and workers.
export SELF1E_CACHE=${SELF1E_CACHE:-$HOME/.cache/self1e}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS

code=0
# srun does not take --cpus-per-task over from sbatch; --kill-on-bad-exit ends the other ranks when one has failed.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' rank \
    python train_hf_ivl_seq.py --config configs/self1e_2b.yaml \
    --version PATH/InternVL3-2B --exp_name self1e_2b \
    --grad_accumulation_steps 4 --auto_resume || code=$?

if [ "$code" -eq 75 ]; then            # stopped on request, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
