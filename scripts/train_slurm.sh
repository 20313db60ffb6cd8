#!/usr/bin/env bash
# Purpose: the README's training command on several nodes of a Slurm cluster. A template: edit the lines marked <--.
# Command: sbatch scripts/train_slurm.sh
# Cost:    as on one node with as many GPUs; the global batch is batch_size x grad_accumulation_steps x GPUs, so lower
#          grad_accumulation_steps as nodes are added to keep the recipe's 5 x 8 x 8 = 320 photos a step.
# Result:  runs/<exp_name>/ckpt_model on the shared file system; a requeued job continues from its last checkpoint.
#
#SBATCH --job-name=self1e
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1            # one torchrun a node; it starts one process a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --mem=0                        # all of a node's memory
#SBATCH --signal=B:USR1@300            # asks for a checkpoint five minutes before the time limit
#SBATCH --open-mode=append             # a requeued job goes on in the same log
#SBATCH --output=%x-%j.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate              # <-- your environment
export NCCL_SOCKET_IFNAME=^lo,docker   # <-- your network
export OMP_NUM_THREADS=8
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# Each node builds the data's index once and shares it among its ranks and workers.
export SELF1E_CACHE=${SELF1E_CACHE:-$HOME/.cache/self1e}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" \
    train_hf_ivl_seq.py --config configs/self1e_2b.yaml \
    --version PATH/InternVL3-2B --exp_name self1e_2b \
    --grad_accumulation_steps 4 --auto_resume &
job=$!

# Slurm signals this script alone; the training saves after its step and ends, and the job is queued again.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"; asked=1' USR1 TERM
asked=0
code=0
until wait "$job"; do
    code=$?
    kill -0 "$job" 2>/dev/null || break   # else the wait was interrupted by the signal
done
if [ "$asked" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
