"""The program behind `eval_vqas.sh`: it reads its flags before it imports anything heavy."""

import sys

from self1e.flags import guarded, uncollected


def main() -> int:
    from self1e.evaluation.vqa.arguments import parse_args  # here, so that Ctrl-C ends it by the guard below

    args = parse_args()
    with uncollected(lasting=True):
        from self1e.evaluation.vqa.run import start

    return start(args)


if __name__ == "__main__":
    sys.exit(guarded(main))
