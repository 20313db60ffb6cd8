"""Fine-tune InternVL3 to segment by itself, and evaluate it. The recipe's command, cost and figures: README, "Train".

deepspeed train_hf_ivl_seq.py --version PATH/InternVL3-2B --exp_name NAME ... # one node, or a hostfile
torchrun --nproc_per_node 8 train_hf_ivl_seq.py ...                           # several nodes: scripts/train_slurm.sh
python train_hf_ivl_seq.py ...                                                # one CPU or GPU, without DeepSpeed
"""

import sys

from self1e.flags import guarded, uncollected


def main() -> int:
    from self1e.training.arguments import parse  # here, so that Ctrl-C ends it by the guard below

    args = parse(sys.argv[1:])  # before anything heavy is imported: --help and a wrong flag are answered at once
    with uncollected(lasting=True):
        from self1e.training.run import start

    return start(args)


if __name__ == "__main__":
    sys.exit(guarded(main))
