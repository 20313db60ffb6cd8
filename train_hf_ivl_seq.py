"""Fine-tune InternVL3 to segment by itself, and evaluate it. The recipe's command, cost and figures: README, "Train".

deepspeed train_hf_ivl_seq.py --version PATH/InternVL3-2B --exp_name NAME ... # one node, or a hostfile
torchrun --nproc_per_node 8 train_hf_ivl_seq.py ...                           # several nodes: scripts/train_slurm.sh
python train_hf_ivl_seq.py ...                                                # one CPU or GPU, without DeepSpeed
"""

import sys

from self1e.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
