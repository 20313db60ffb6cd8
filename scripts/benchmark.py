"""Time, memory and FLOPs of evaluation, training and generation, and how fast data and a checkpoint load.

Command:  python scripts/benchmark.py [--version PATH/InternVL3-2B --device cuda --dtype bf16 --dataset_dir dataset]
Cost:     about a minute on 2 CPU cores with the default tiny model and synthetic data.
Output:   a table; FOLDER/benchmark.json with every figure, FOLDER/benchmark.png with cost over sentences.
Expected: ratios of FLOPs and memory above 1; of the tiny model 3.7 and 2.9 at 7 sentences, 4.9 and 4.7 at 30. Figures
          at the 2B's widths are in docs/log.md, rates of real photos in docs/data.md.

The baseline gives each row its own image, attends eagerly and computes vocabulary logits of every token. `of peak` is
the FLOPs per second as a share of what a large matrix product reaches here.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from self1e.distributed import run_program  # noqa: E402
from self1e.files import check_writable  # noqa: E402
from self1e.model.weights import checkpoint_folder  # noqa: E402

parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
parser.add_argument("--version", type=checkpoint_folder, help="a checkpoint; unset: a tiny random model")
parser.add_argument("--device", help="where to run; unset: the GPU if there is one")
parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="precision of the weights")
parser.add_argument("--sentences", type=int, nargs="+", default=[1, 7, 30], help="sentences about one photo")
parser.add_argument("--dataset_dir", type=Path, help="tree of training sets; unset: synthetic scenes in every format")
parser.add_argument("--data_dir", type=Path, default=Path("./data"), help="tree of VQA sets beside --dataset_dir")
parser.add_argument("--samples", type=int, default=24, help="samples of each set that are read")
parser.add_argument("--matmul", type=int, default=1024, help="side of the matrices that measure the peak")
parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts")
parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder of the results")


def main(argv: list[str] | None = None) -> int:
    args = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'self1e[plots]'")
    check_writable(args.output)
    from self1e.apps.benchmark import benchmark

    print(benchmark(args))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
