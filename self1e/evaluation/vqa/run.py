"""Evaluate models on VQA benchmarks; started by `eval_vqas.sh`, on one process or under torchrun.

Replies go to `<log_base_dir>/<exp_name>/eval_vqa/<benchmark>.jsonl` as they are produced, one line a question; scores,
the official programs' result files (`official/`) and the summary are computed from these files alone. An interrupted
run continues where it stopped.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from self1e.evaluation.runtime import Ranks, fingerprint, markdown_table, trained_weights, write_text
from self1e.evaluation.vqa.benchmarks import VQA_BENCHMARKS, Answer, Benchmark, Question, get_vqa_benchmarks
from self1e.evaluation.vqa.generation import answer_questions
from self1e.evaluation.vqa.predictions import Predictions
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processing import Self1EProcessor

README = "docs/vqa.md, section Benchmarks"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OWN_WEIGHTS = "none"


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

    One model writes to `<log_base_dir>/<exp_name>/eval_vqa`, several to a folder below it each. Raises ValueError when
    the numbers do not fit.
    """
    if len(versions) > 1 and len(weights) not in (0, len(versions)):
        raise ValueError(
            f"{len(versions)} --version but {len(weights)} --model_weights: give one for each, `{OWN_WEIGHTS}` for a "
            "version's own weights"
        )
    count = max(len(versions), len(weights))
    versions = list(versions) * (count if len(versions) == 1 else 1)
    if weights:
        chosen = [None if each == OWN_WEIGHTS else each for each in weights]
    elif count == 1:
        chosen = [trained_weights(None, log_base_dir, exp_name)]
    else:
        chosen = [None] * count
    root = log_base_dir / exp_name / "eval_vqa"
    if count == 1:
        return [Candidate(_label(chosen[0] or versions[0]), versions[0], chosen[0], root)]
    labels = [_label(own or version) for version, own in zip(versions, chosen)]
    labels = [label if labels.count(label) == 1 else f"{label}_{i}" for i, label in enumerate(labels, 1)]
    return [Candidate(label, v, w, root / label) for label, v, w in zip(labels, versions, chosen)]


def _label(checkpoint: str) -> str:
    """`runs/e/ckpt_model` -> `e_ckpt_model`, `OpenGVLab/InternVL3-2B` -> `InternVL3-2B`."""
    parts = Path(checkpoint).resolve().parts if checkpoint.startswith(".") else Path(checkpoint).parts
    return "_".join(parts[-2:]) if parts[-1].startswith("ckpt_model") and len(parts) > 1 else parts[-1]


def read_questions(
    benchmark: Benchmark, data_dir: Path, *, with_images: bool, with_references: bool
) -> list[Question]:
    """Questions of a benchmark. Raises FileNotFoundError or ValueError naming the file that is missing or malformed.

    with_images: every photo must be there. with_references: score blank replies, which reads all reference files.
    """
    questions = benchmark.questions(data_dir)
    if with_references and benchmark.metric is not None:
        benchmark.metric([Answer(question, "") for question in questions], data_dir)
    if with_images:
        paths = {question.image for question in questions if isinstance(question.image, Path)}
        missing = sorted(path for path in paths if not path.is_file())
        if missing:
            raise FileNotFoundError(f"{missing[0]} is missing, one of {len(missing)} missing photos")
    return questions


def predict(
    load_model: Callable[[], tuple[Any, Any]],
    benchmark: Benchmark,
    predictions: Predictions,
    settings: dict,
    ranks: Ranks,
    *,
    title: str,
    **options,
) -> None:
    """Answer what is unanswered, on all ranks, and join the files. `options`: see `answer_questions`."""
    settings = settings | {"max_new_tokens": benchmark.max_new_tokens}
    done = ranks.run(lambda: predictions.open(settings), main_only=True)
    open_ones = [index for index in range(len(predictions.questions)) if index not in done]
    if not open_ones:
        return
    model, processor = load_model()

    def work() -> None:
        batches = answer_questions(
            model,
            processor,
            predictions.questions,
            ranks.share(open_ones),
            max_new_tokens=benchmark.max_new_tokens,
            progress=title if ranks.is_main else None,
            **options,
        )
        for asked, replies in batches:
            predictions.append(ranks.rank, asked, replies)

    ranks.run(work)
    ranks.run(lambda: predictions.join(predictions.read()), main_only=True)


def score(name: str, benchmark: Benchmark, predictions: Predictions, candidate: Candidate, data_dir: Path) -> dict:
    """Scores of one benchmark from its replies on disk; writes `<name>.scores.json` and the official result files."""
    answers = predictions.answers()
    benchmark.export(answers, candidate.folder / "official", candidate.label)
    result = {"benchmark": name, "model": candidate.label, "n": len(answers)}
    if benchmark.metric is None:
        result |= {"summary": {}, "details": {}, "notes": ["no local score: send the file in official/ to the server"]}
    else:
        result |= asdict(benchmark.metric(answers, data_dir))
    write_text(candidate.folder / f"{name}.scores.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    return result


def summary_table(candidates: Sequence[Candidate], results: dict[str, list[dict | None]]) -> str:
    """Markdown: a row for each figure, a column for each model, and last minus first where there are several."""
    header = ["benchmark", "figure", *(candidate.label for candidate in candidates)]
    if len(candidates) > 1:
        header.append("last - first")
    rows, notes = [], []
    for name, per_model in results.items():
        figures = list(dict.fromkeys(chain.from_iterable(result["summary"] for result in per_model if result)))
        for figure in figures or ["-"]:
            values = [result["summary"].get(figure) if result else None for result in per_model]
            row = [name, figure] + [_cell(result, value) for result, value in zip(per_model, values)]
            if len(candidates) > 1:
                row.append("" if None in (values[0], values[-1]) else f"{values[-1] - values[0]:+.2f}")
            rows.append(row)
        notes += [
            f"- {name}, {result['model']}: {note}\n" for result in per_model if result for note in result["notes"]
        ]
    text = markdown_table(header, rows, text_columns=2) + "\nPercent, unless the figure names points.\n"
    return text + ("\n" + "".join(notes) if notes else "")


def _cell(result: dict | None, value: float | None) -> str:
    if result is None:
        return "failed"
    return "server" if value is None else f"{value:.2f}"


def evaluate(
    candidates: Sequence[Candidate],
    benchmarks: dict[str, Benchmark],
    ranks: Ranks,
    *,
    data_dir: Path,
    output_dir: Path,
    device: torch.device,
    precision: str = "fp32",
    attn_implementation: str = "sdpa",
    max_tiles: int = 1,
    batch_size: int = 8,
    workers: int = 0,
    score_only: bool = False,
) -> dict[str, str]:
    """Answer and score every benchmark with every model, and write `summary.md` and `summary.json` to `output_dir`.

    What is wrong with one benchmark does not stop the others. Returns what failed: "<benchmark>, <model>" -> why.
    """
    failures: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    checks = {"with_images": not score_only, "with_references": not score_only and ranks.is_main}
    for name, benchmark in benchmarks.items():  # all of them first: what is missing shows before the long work starts
        try:
            questions[name] = ranks.run(lambda: read_questions(benchmark, data_dir, **checks))  # noqa: B023
        except ValueError as error:
            _report(failures, name, error, ranks)
    options = {"batch_size": batch_size, "max_tiles": max_tiles, "workers": workers}
    results: dict[str, list[dict | None]] = {name: [] for name in benchmarks}
    for candidate in candidates:
        model = _Lazy(candidate, device, PRECISIONS[precision], attn_implementation)
        settings = {
            "version": fingerprint(candidate.version),
            "weights": fingerprint(candidate.weights) if candidate.weights else None,
            "precision": precision,
            "attn_implementation": attn_implementation,
            "max_tiles": max_tiles,
        }
        for name, benchmark in benchmarks.items():
            result = None
            if name in questions:
                predictions = Predictions(candidate.folder, name, questions[name])
                try:
                    if not score_only:
                        title = f"{candidate.label} {name}"
                        predict(model, benchmark, predictions, settings, ranks, title=title, **options)
                    result = ranks.run(
                        lambda: score(name, benchmark, predictions, candidate, data_dir),  # noqa: B023
                        main_only=True,
                    )
                except ValueError as error:
                    _report(failures, f"{name}, {candidate.label}", error, ranks)
            results[name].append(result)
        model.free()
    if ranks.is_main:
        table = summary_table(candidates, results)
        content = {
            "models": [{"label": c.label, "version": c.version, "weights": c.weights} for c in candidates],
            "figures": {
                name: {result["model"]: result["summary"] for result in per_model if result}
                for name, per_model in results.items()
            },
            "failures": failures,
        }
        write_text(output_dir / "summary.md", table)
        write_text(output_dir / "summary.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        print(table, flush=True)
    return failures


def _report(failures: dict[str, str], what: str, error: Exception, ranks: Ranks) -> None:
    failures[what] = f"{error} ({README})"
    if ranks.is_main:
        print(f"error: {what}: {failures[what]}", file=sys.stderr, flush=True)


class _Lazy:
    """Loads model and processor at the first call: a run whose questions are all answered needs neither."""

    def __init__(self, candidate: Candidate, device: torch.device, dtype: torch.dtype, attn_implementation: str):
        self.candidate, self.device, self.dtype, self.attention = candidate, device, dtype, attn_implementation
        self.loaded = None

    def __call__(self) -> tuple[Self1EForSegmentation, Self1EProcessor]:
        if self.loaded is None:
            version, weights = self.candidate.version, self.candidate.weights
            try:
                processor = Self1EProcessor.from_pretrained(version)
                model = Self1EForSegmentation.from_pretrained(
                    version, weights=weights, dtype=self.dtype, attn_implementation=self.attention
                )
            except (ValueError, OSError) as error:  # no benchmark can be answered
                raise SystemExit(f"error: cannot load {self.candidate.label}: {error}") from error
            model.generation_config = GenerationConfig()  # a checkpoint's own penalties would bend greedy search
            self.loaded = model.to(self.device).eval(), processor
        return self.loaded

    def free(self) -> None:
        self.loaded = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_vqas.sh", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--version",
        nargs="+",
        action="extend",
        required=True,
        metavar="V",
        help="model folder or hub id; two for base and fine-tuned side by side (also as a repeated flag)",
    )
    add(
        "--model_weights",
        nargs="+",
        action="extend",
        default=[],
        metavar="W",
        help=f"weights over --version, one for each, or several over one; `{OWN_WEIGHTS}` = the version's own. "
        "Default: <log_base_dir>/<exp_name>/ckpt_model if it is there (with one --version), else the version's own",
    )
    add("--exp_name", required=True, help="results go to <log_base_dir>/<exp_name>/eval_vqa")
    add("--log_base_dir", type=Path, default=Path("runs"))
    add("--data_dir", type=Path, default=Path("data"), help="InternVL's data folder; `data/` in image paths means it")
    add(
        "--datasets",
        nargs="+",
        default=list(VQA_BENCHMARKS),
        metavar="NAME",
        help="benchmarks, separated by blanks, quoted or not; default: " + " ".join(VQA_BENCHMARKS),
    )
    add("--dynamic", action="store_true", help="cut photos to tiles, InternVL's rule, and add a thumbnail")
    add("--max_num", type=int, default=6, help="most tiles a photo with --dynamic (without the thumbnail)")
    add("--precision", choices=PRECISIONS, help="default: bf16 on a GPU, fp32 on a CPU")
    add("--attn_implementation", default="sdpa", choices=("eager", "sdpa", "flash_attention_2"))
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch_size", type=int, default=8, help="questions a forward pass, each process")
    add("--workers", type=int, default=4, help="processes that decode and tile photos, each process")
    add("--score_only", action="store_true", help="score the replies that are on disk; no model is loaded")
    args = parser.parse_args(argv)
    if args.max_num < 1 or args.batch_size < 1 or args.workers < 0:
        parser.error("--max_num and --batch_size must be at least 1, --workers at least 0")
    try:
        args.benchmarks = get_vqa_benchmarks(" ".join(args.datasets).split())
        args.candidates = list_candidates(args.version, args.model_weights, args.log_base_dir, args.exp_name)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command line `argv`; returns the exit code, 1 when a benchmark failed."""
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    with Ranks() as ranks:
        try:
            device = ranks.device(args.device)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        if ranks.is_main:
            for candidate in args.candidates:
                weights = candidate.weights or "its own weights"
                print(f"{candidate.label}: {candidate.version}, {weights} -> {candidate.folder}", flush=True)
        failures = evaluate(
            args.candidates,
            args.benchmarks,
            ranks,
            data_dir=args.data_dir,
            output_dir=args.log_base_dir / args.exp_name / "eval_vqa",
            device=device,
            precision=args.precision or ("bf16" if device.type == "cuda" else "fp32"),
            attn_implementation=args.attn_implementation,
            max_tiles=args.max_num if args.dynamic else 1,
            batch_size=args.batch_size,
            workers=args.workers,
            score_only=args.score_only,
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
