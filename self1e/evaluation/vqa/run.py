"""Evaluate models on VQA benchmarks; started by `eval_vqas.sh`, on one process or under torchrun.

Replies go to `<log_base_dir>/<exp_name>/eval_vqa/` as they are produced, one line per question; scores, the official
programs' result files (`official/`) and the summary are computed from these files alone. An interrupted run continues
where it stopped.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from self1e import distributed
from self1e.data.sample import SampleError
from self1e.evaluation.provenance import Settings, checkpoint_settings, describe
from self1e.evaluation.vqa.base import Answer, Question, VQABenchmark
from self1e.evaluation.vqa.generation import answer_questions
from self1e.evaluation.vqa.predictions import Predictions
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS, get_vqa_benchmarks
from self1e.evaluation.vqa.report import summary_table
from self1e.files import write_json, write_text
from self1e.model.configuration import DTYPES, SWITCHES, Self1EConfig
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processing import Self1EProcessor

README = "docs/vqa.md, section Benchmarks"
OWN_WEIGHTS = "none"
EXPECTED = (ValueError, OSError, SampleError)  # of data, files and flags; each message names what is at fault
TIMEOUT = timedelta(days=1)  # that a rank may wait for another one's share of the questions


class CannotLoad(Exception):
    """A checkpoint that cannot be loaded: no benchmark can be answered."""


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
    if len(versions) > 1 and len(weights) not in (0, len(versions)):
        raise ValueError(
            f"{len(versions)} --version but {len(weights)} --model_weights: give one for each, `{OWN_WEIGHTS}` for a "
            "version's own weights"
        )
    count = max(len(versions), len(weights))
    versions = list(versions) * (count if len(versions) == 1 else 1)
    chosen: list[str | None] = [None if each == OWN_WEIGHTS else each for each in weights] or [None] * count
    trained, root = log_base_dir / exp_name / "ckpt_model", log_base_dir / exp_name / "eval_vqa"
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


def read_questions(
    benchmark: VQABenchmark, data_dir: Path, *, with_images: bool, with_references: bool
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
    benchmark: VQABenchmark,
    predictions: Predictions,
    settings: Settings,
    *,
    title: str,
    overwrite: bool,
    **options: Any,
) -> None:
    """Answer what is unanswered, on all ranks, and join the files. `options`: see `answer_questions`."""
    settings = settings | {"figures": settings["figures"] | {"max_new_tokens": benchmark.max_new_tokens}}
    done = distributed.on_main(lambda: predictions.open(settings, overwrite=overwrite))
    unanswered = [index for index in range(len(predictions.questions)) if index not in done]
    if not unanswered:
        return
    model, processor = load_model()

    def work() -> None:
        batches = answer_questions(
            model,
            processor,
            predictions.questions,
            distributed.share(unanswered),
            max_new_tokens=benchmark.max_new_tokens,
            progress=title if distributed.is_main() else None,
            **options,
        )
        for asked, replies in batches:
            predictions.append(asked, replies)

    distributed.everywhere(work, catch=EXPECTED)
    distributed.on_main(predictions.finish)


def score(name: str, benchmark: VQABenchmark, predictions: Predictions, candidate: Candidate, data_dir: Path) -> dict:
    """Scores of one benchmark from its replies on disk; writes `<name>.scores.json` and the official result files."""
    answers = predictions.answers()
    benchmark.export(answers, candidate.folder / "official", candidate.label)
    result = {"benchmark": name, "model": candidate.label, "n": len(answers)}
    if benchmark.metric is None:
        result |= {"summary": {}, "details": {}, "notes": ["no local score: send the file in official/ to the server"]}
    else:
        result |= asdict(benchmark.metric(answers, data_dir))
    write_json(candidate.folder / f"{name}.scores.json", result)
    return result


def evaluate(
    candidates: Sequence[Candidate],
    benchmarks: dict[str, VQABenchmark],
    *,
    data_dir: Path,
    output_dir: Path,
    device: torch.device,
    precision: str = "fp32",
    attn_implementation: str = "sdpa",
    rope_precision: str | None = None,
    max_tiles: int = 1,
    batch_size: int = 8,
    workers: int = 0,
    score_only: bool = False,
    overwrite: bool = False,
) -> dict[str, str]:
    """Answer and score every benchmark with every model, and write `summary.md` and `summary.json` to `output_dir`.

    What is wrong with one benchmark does not stop the others. Returns what failed: "<benchmark>, <model>" -> why.
    Raises CannotLoad for a checkpoint; KeyboardInterrupt with a message that says what is done.
    """
    failures: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    checks = {"with_images": not score_only, "with_references": not score_only and distributed.is_main()}
    for name, benchmark in benchmarks.items():  # all of them first: what is missing shows before the long work starts
        try:
            questions[name] = distributed.everywhere(partial(read_questions, benchmark, data_dir, **checks))
        except EXPECTED as error:
            _report(failures, name, error)
    options = {"batch_size": batch_size, "max_tiles": max_tiles, "workers": workers}
    results: dict[str, list[dict | None]] = {name: [] for name in benchmarks}
    for candidate in candidates:
        chosen = {"attn_implementation": attn_implementation}
        chosen |= {"rope_precision": rope_precision} if rope_precision else {}
        model = _Lazy(candidate, device, dtype=DTYPES[precision], **chosen)
        figures = {"precision": precision, "max_tiles": max_tiles, **chosen}
        figures |= {} if score_only else checkpoint_settings(candidate.version, candidate.weights)
        settings = describe(figures, device)
        for name, benchmark in benchmarks.items():
            result = None
            if name in questions:
                predictions = Predictions(candidate.folder, name, questions[name])
                try:
                    if not score_only:
                        title = f"{candidate.label} {name}"
                        predict(model, benchmark, predictions, settings, title=title, overwrite=overwrite, **options)
                    result = distributed.on_main(partial(score, name, benchmark, predictions, candidate, data_dir))
                except EXPECTED as error:
                    _report(failures, f"{name}, {candidate.label}", error)
                except KeyboardInterrupt as error:
                    raise KeyboardInterrupt(_progress(results, predictions, candidate.label)) from error
            results[name].append(result)
        model.free()
    if distributed.is_main():
        table = summary_table([candidate.label for candidate in candidates], results)
        content = {
            "models": [{"label": c.label, "version": c.version, "weights": c.weights} for c in candidates],
            "figures": {
                name: {result["model"]: result["summary"] for result in per_model if result}
                for name, per_model in results.items()
            },
            "failures": failures,
        }
        write_text(output_dir / "summary.md", table)
        write_json(output_dir / "summary.json", content)
        print(table, flush=True)
    return failures


def _progress(results: dict[str, list[dict | None]], predictions: Predictions, label: str) -> str:
    """What an interrupted run says."""
    done = [f"{name} ({result['model']})" for name, per_model in results.items() for result in per_model if result]
    answered = f"{len(predictions.read())} of {len(predictions.questions)} questions of {predictions.name} ({label})"
    return f"interrupted; done: {', '.join(done) or 'none'}; {answered}. The same command continues from there"


def _report(failures: dict[str, str], what: str, error: Exception) -> None:
    failures[what] = f"{error} ({README})"
    if distributed.is_main():
        print(f"error: {what}: {failures[what]}", file=sys.stderr, flush=True)


class _Lazy:
    """Loads model and processor at the first call: a run whose questions are all answered needs neither."""

    def __init__(self, candidate: Candidate, device: torch.device, **options: Any):
        self.candidate, self.device, self.options = candidate, device, options
        self.loaded: tuple[Self1EForSegmentation, Self1EProcessor] | None = None

    def __call__(self) -> tuple[Self1EForSegmentation, Self1EProcessor]:
        if self.loaded is None:
            version, weights = self.candidate.version, self.candidate.weights
            try:
                processor = Self1EProcessor.from_pretrained(version)
                model = Self1EForSegmentation.from_pretrained(version, weights=weights, **self.options)
            except EXPECTED as error:
                raise CannotLoad(f"cannot load {self.candidate.label}: {error}") from error
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
        help=f"weights over --version, one for each, or several over one; `{OWN_WEIGHTS}` means the version's own. "
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
    add("--max_num", type=int, default=6, help="the most tiles per photo with --dynamic, without the thumbnail")
    add("--precision", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    add("--attn_implementation", default="sdpa", choices=("eager", "sdpa", "flash_attention_2"))
    add("--rope_precision", **SWITCHES["rope_precision"].flag(Self1EConfig.rope_precision))
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch_size", type=int, default=8, help="questions per forward pass of a process")
    add("--workers", type=int, default=4, help="processes per rank that decode and tile photos")
    add("--score_only", action="store_true", help="score the replies that are on disk; no model is loaded")
    add("--overwrite_eval", action="store_true", help="drop the replies that are on disk and ask every question anew")
    args = parser.parse_args(argv)
    if args.max_num < 1 or args.batch_size < 1 or args.workers < 0:
        parser.error("--max_num and --batch_size must be at least 1, --workers at least 0")
    if args.score_only and args.overwrite_eval:
        parser.error("--score_only scores the replies that --overwrite_eval drops: give one of them")
    try:
        args.benchmarks = get_vqa_benchmarks(" ".join(args.datasets).split())
        args.candidates = list_candidates(args.version, args.model_weights, args.log_base_dir, args.exp_name)
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say; returns the exit code: 1 when a benchmark failed, 130 after Ctrl-C."""
    distributed.start("gloo", timeout=TIMEOUT)  # ranks exchange small objects only, on any kind of device
    device = distributed.device(args.device)
    if distributed.is_main():
        for candidate in args.candidates:
            weights = candidate.weights or "its own weights"
            print(f"{candidate.label}: {candidate.version}, {weights} -> {candidate.folder}", flush=True)
    try:
        failures = evaluate(
            args.candidates,
            args.benchmarks,
            data_dir=args.data_dir,
            output_dir=args.log_base_dir / args.exp_name / "eval_vqa",
            device=device,
            precision=args.precision or ("bf16" if device.type == "cuda" else "fp32"),
            attn_implementation=args.attn_implementation,
            rope_precision=args.rope_precision,
            max_tiles=args.max_num if args.dynamic else 1,
            batch_size=args.batch_size,
            workers=args.workers,
            score_only=args.score_only,
            overwrite=args.overwrite_eval,
        )
    except KeyboardInterrupt as error:
        if distributed.is_main():
            print(f"\n{str(error) or 'interrupted before the first question'}", file=sys.stderr, flush=True)
        return 130
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command line `argv`; returns the exit code."""
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    return distributed.run_program(lambda: run(args), expected=(*EXPECTED, CannotLoad))


if __name__ == "__main__":
    sys.exit(main())
