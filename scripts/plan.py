"""What a training run will take of each GPU, and how long it will last, before there is one.

Command:  python scripts/plan.py --version 2B --gpus 8 --gpu_memory 80 --config configs/self1e_2b.yaml
Cost:     a minute on one CPU core; the model has shapes, but no weights.
Output:   a table, and FOLDER/plan.json with every figure.
Expected: docs/memory.md, section Planning a run.

All flags of training are taken, with training's defaults: --batch_size, --lora_r, --no-use_llm_lora, ... Counted are
parameters, live tensors and FLOPs of a full micro-batch: per photo, --num_classes_per_sample rows of
--model_max_length tokens. What DeepSpeed adds follows from configs/zero2.json and configs/zero3.json. Headroom,
utilisation and samples are assumptions.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from self1e.distributed import run_program  # noqa: E402
from self1e.files import check_writable  # noqa: E402

GB = 1e9


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plan.py", usage="%(prog)s [flags] [flags of training]", description=__doc__)
    parser.add_argument("--version", default="2B", help="a checkpoint, or 1B, 2B, 8B for an InternVL3 (default: 2B)")
    parser.add_argument("--gpus", type=int, default=8, help="in all (default: 8)")
    parser.add_argument("--gpu_memory", type=float, default=80, metavar="GB", help="of one GPU (default: 80)")
    text = "its peak in --precision; 312 is an A100's in bf16 (default: 312)"
    parser.add_argument("--gpu_tflops", type=float, default=312, metavar="TFLOPS", help=text)
    text = "ASSUMED share of the peak that a run reaches (default: 0.35)"
    parser.add_argument("--utilisation", type=float, default=0.35, metavar="SHARE", help=text)
    text = "ASSUMED share of the memory that CUDA, workspaces and fragmentation take (default: 0.1)"
    parser.add_argument("--headroom", type=float, default=0.1, metavar="SHARE", help=text)
    text = "ASSUMED samples per epoch (default: 580000, the base mixture); a run prints its own when it starts"
    parser.add_argument("--samples", type=int, default=580_000, metavar="N", help=text)
    text = "supervised tokens per row (default: 64; three such rows are as much as a long conversation)"
    parser.add_argument("--answer_tokens", type=int, default=64, metavar="N", help=text)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/plan"), metavar="FOLDER", help="(default: runs/plan)"
    )
    return parser


def table(args: argparse.Namespace, plan: dict) -> str:
    """The plan in GB per GPU."""
    names = ("parameters", "gradients", "optimizer", "buffers")
    lines = [f"{'GB per GPU':<16}" + "".join(f"{name:>12}" for name in (*names, "activations", "total"))]
    lines[0] += f"{'largest batch':>15}{'CPU memory':>12}"
    for case in plan["cases"]:
        label = f"ZeRO-{case['stage']}" + (" offload" if case["offload"] else "")
        sizes = [case[name] for name in names] + [plan["activations"], case["total"]]
        lines.append(f"{label:<16}" + "".join(f"{size / GB:>12.1f}" for size in sizes))
        lines[-1] += f"{case['largest'] or 'none':>15}{case['host'] / GB:>12.1f}"
    further = plan["activations_per_further_photo"] / GB
    lines += [
        f"\n{plan['version']}: {plan['parameters'] / 1e6:,.0f} M parameters, {plan['trained'] / 1e6:,.0f} M trained",
        f"activations are those of --batch_size {args.batch_size}; a further photo takes {further:.2f} GB; the "
        f"largest batch leaves {args.headroom:.0%} of {args.gpu_memory:g} GB",
        f"an epoch of {args.samples:,} samples: {plan['steps_per_epoch']:,} steps of {args.batch_size} photos x "
        f"{args.grad_accumulation_steps} micro-batches x {args.gpus} GPUs",
        f"{plan['days_per_epoch']:.2f} days per epoch: {plan['flops_per_micro_batch'] / 1e12:,.1f} TFLOP per "
        f"micro-batch at an ASSUMED {args.utilisation:.0%} of {args.gpu_tflops:g} TFLOPS; shorter rows take less",
        "ZeRO-2 with offload is for comparison: training offloads under ZeRO-3 alone (configs/zero3_offload.json)",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    own, rest = make_parser().parse_known_args(argv)
    check_writable(own.output)
    from self1e.apps.plan import make_plan
    from self1e.training.args import parse

    args = argparse.Namespace(**vars(parse([*rest, "--version", own.version, "--exp_name", "plan"])) | vars(own))
    plan = make_plan(args)
    own.output.mkdir(parents=True, exist_ok=True)
    (own.output / "plan.json").write_text(json.dumps(vars(own) | plan, indent=2, default=str) + "\n", encoding="utf-8")
    print(table(args, plan))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
