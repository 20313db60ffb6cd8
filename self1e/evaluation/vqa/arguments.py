"""The flags of `eval_vqas.sh`, and the models that they name."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from self1e.evaluation.vqa.registry import VQA_BENCHMARKS, get_vqa_benchmarks
from self1e.flags import Parser, between, device, whole
from self1e.model.config import SWITCHES
from self1e.model.weights import checkpoint_folder

OWN_WEIGHTS = "none"
DESCRIPTION = """Evaluate models on VQA benchmarks, on one process or several.

Replies go to LOG_BASE_DIR/EXP_NAME/eval_vqa as they are produced, one line per question; scores, the official
programs' result files (official/) and the summary are computed from these files alone. An interrupted run continues
where it stopped.
"""


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate. `folder`: where its results go; `label`: its column in the summary."""

    label: str
    version: str
    weights: str | None
    folder: Path


def list_candidates(
    versions: Sequence[str], weights: Sequence[str], log_base_dir: Path, exp_name: str
) -> list[Candidate]:
    """Pair `--version` with `--model_weights`; one of either kind serves all of the other.

    Without `--model_weights`, a single version is evaluated with `<log_base_dir>/<exp_name>/ckpt_model` if it is
    there. One model writes to `<log_base_dir>/<exp_name>/eval_vqa`, several to a folder below it each. Raises
    ValueError when the numbers do not fit.
    """
    trained, root = log_base_dir / exp_name / "ckpt_model", log_base_dir / exp_name / "eval_vqa"
    if not versions and not trained.is_dir():
        raise ValueError(f"--version is needed: there is no {trained}")
    versions = versions or [str(trained)]
    if len(versions) > 1 and len(weights) not in (0, len(versions)):
        raise ValueError(
            f"{len(versions)} --version but {len(weights)} --model_weights: give one for each, `{OWN_WEIGHTS}` for a "
            "version's own weights"
        )
    count = max(len(versions), len(weights))
    versions = list(versions) * (count if len(versions) == 1 else 1)
    chosen: list[str | None] = [None if each == OWN_WEIGHTS else each for each in weights] or [None] * count
    if not weights and count == 1 and trained.is_dir():
        chosen = [str(trained)]
    if count == 1:
        return [Candidate(_label(chosen[0] or versions[0]), versions[0], chosen[0], root)]
    labels = [_label(own or version) for version, own in zip(versions, chosen)]
    labels = [label if labels.count(label) == 1 else f"{label}_{i}" for i, label in enumerate(labels, 1)]
    return [Candidate(label, v, w, root / label) for label, v, w in zip(labels, versions, chosen)]


def _label(checkpoint: str) -> str:
    """`runs/e/ckpt_model` -> `e_ckpt_model`, `OpenGVLab/InternVL3-2B` -> `InternVL3-2B`."""
    parts = Path(checkpoint).resolve().parts if checkpoint.startswith(".") else Path(checkpoint).parts
    return "_".join(parts[-2:]) if parts[-1].startswith("ckpt_model") and len(parts) > 1 else parts[-1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="self1e eval vqa", description=DESCRIPTION)
    add = parser.add_argument
    # fmt: off
    # A flag is one line, and where that is too long its help another.
    add("--version", type=checkpoint_folder, nargs="+", action="extend", default=[], metavar="V",
        help="model folder, run folder or hub id, needed where the run holds no model; two for base and fine-tuned "
             "side by side (also as a repeated flag)")
    add("--model_weights", type=checkpoint_folder, nargs="+", action="extend", default=[], metavar="W",
        help=f"weights over --version, one for each, or several over one; `{OWN_WEIGHTS}` means the version's own. "
             "Default: <log_base_dir>/<exp_name>/ckpt_model if it is there (with one --version), else the version's "
             "own")
    add("--exp_name", required=True, help="results go to <log_base_dir>/<exp_name>/eval_vqa")
    add("--log_base_dir", type=Path, default=Path("runs"))
    add("--data_dir", type=Path, default=Path("data"), help="InternVL's data folder; `data/` in image paths means it")
    add("--datasets", nargs="+", default=list(VQA_BENCHMARKS), metavar="NAME",
        help="benchmarks, separated by blanks, quoted or not; default: " + " ".join(VQA_BENCHMARKS))
    add("--dynamic", action="store_true", help="cut photos to tiles, InternVL's rule, and add a thumbnail")
    add("--max_num", type=whole(1), default=6, help="the most tiles per photo with --dynamic, without the thumbnail")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--attn_implementation", default="sdpa", choices=("eager", "sdpa", "flash_attention_2"))
    add("--rope_precision", **SWITCHES["rope_precision"].flag())
    add("--device", type=device, choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch_size", type=whole(1), default=8, help="questions per forward pass of a process")
    add("--workers", type=whole(0), default=4, help="processes per rank that decode and tile photos")
    add("--allow_outside", action="store_true", help="take photos that question files name outside --data_dir")
    add("--timeout", type=between(1, 1e7), default=1800.0, help="seconds without progress that end the run")
    add("--score_only", action="store_true", help="score the replies that are on disk; no model is loaded")
    add("--overwrite_eval", action="store_true", help="drop the replies that are on disk and ask every question anew")
    # fmt: on
    args = parser.parse_args(argv)
    if args.score_only and args.overwrite_eval:
        parser.error("--score_only scores the replies that --overwrite_eval drops: give one of them")
    try:
        args.benchmarks = get_vqa_benchmarks(" ".join(args.datasets).split())
        args.candidates = list_candidates(args.version, args.model_weights, args.log_base_dir, args.exp_name)
    except ValueError as error:
        parser.error(str(error))
    return args
