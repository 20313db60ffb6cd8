"""Evaluate models on VQA benchmarks; started by `eval_vqas.sh`, on one process or under torchrun.

Replies are written as they are produced; scores, the official programs' result files (`official/`) and the summary are
computed from these files alone.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from self1e import distributed
from self1e.data.paths import inside
from self1e.data.samples import SampleError, check_texts
from self1e.errors import UserError
from self1e.evaluation.provenance import Settings, checkpoint_settings, describe
from self1e.evaluation.vqa.arguments import Candidate, parse_args
from self1e.evaluation.vqa.base import Answer, Question, VQABenchmark
from self1e.evaluation.vqa.generation import answer_questions
from self1e.evaluation.vqa.predictions import Predictions
from self1e.evaluation.vqa.report import summary_table
from self1e.evaluation.watchdog import Watchdog
from self1e.files import write_json, write_text
from self1e.flags import check_writable, told
from self1e.model.config import DTYPES
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processor import Self1EProcessor
from self1e.model.prompts import IMAGE_TAG

README = "docs/vqa.md, section Benchmarks"
EXPECTED = (ValueError, OSError, SampleError)  # of data, files and flags; each message names what is at fault
TIMEOUT = timedelta(days=1)  # that a rank may wait for another one's share of the questions


class CannotLoad(Exception):
    """A checkpoint that cannot be loaded: no benchmark can be answered."""


def read_questions(
    benchmark: VQABenchmark, data_dir: Path, *, with_images: bool, with_references: bool, allow_outside: bool
) -> list[Question]:
    """Questions of a benchmark. Raises FileNotFoundError or ValueError naming the file that is missing or malformed.

    with_images: every photo must be there. with_references: score blank replies, which reads all reference files.
    allow_outside: photos may lie outside the data folder (see `paths.inside`).
    """
    questions = benchmark.questions(data_dir)
    for question in questions:
        # A question may say where its photo belongs.
        check_texts(f"question {question.id}", [question.prompt.replace(IMAGE_TAG, "", 1)])
    if with_references and benchmark.metric is not None:
        benchmark.metric([Answer(question, "") for question in questions], data_dir)
    if with_images:
        paths = {question.image: question for question in questions if isinstance(question.image, Path)}
        for path, question in paths.items() if not allow_outside else ():
            name = path.relative_to(data_dir) if path.is_relative_to(data_dir) else path.absolute()
            try:
                inside(data_dir, str(name))
            except UserError as error:
                raise UserError(f"question {question.id}: {error}") from error
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
    watchdog: Watchdog | None,
    **options: Any,
) -> None:
    """Answer what is unanswered, on all ranks, and join the files.

    watchdog: hears what this rank does. options: see `answer_questions`.
    """
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
            watchdog=watchdog,
            **options,
        )
        try:
            for asked, replies in batches:
                predictions.append(asked, replies)
        finally:
            if watchdog is not None:
                watchdog.waiting()

    distributed.everywhere(work, catch=EXPECTED)
    if watchdog is not None:
        watchdog.pause()
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


def evaluate(args: argparse.Namespace, output_dir: Path, device: torch.device, watchdog: Watchdog) -> dict[str, str]:
    """Answer and score every benchmark with every model, and write `summary.md` and `summary.json` to `output_dir`.

    What is wrong with one benchmark does not stop the others. Returns what failed: "<benchmark>, <model>" -> why.
    Raises CannotLoad for a checkpoint; KeyboardInterrupt with a message that says what is done.
    """
    candidates, benchmarks, data_dir = args.candidates, args.benchmarks, args.data_dir
    failures: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    checks = {"with_images": not args.score_only, "with_references": not args.score_only and distributed.is_main()}
    checks["allow_outside"] = args.allow_outside
    for name, benchmark in benchmarks.items():  # all of them first: what is missing shows before the long work starts
        try:
            questions[name] = distributed.everywhere(partial(read_questions, benchmark, data_dir, **checks))
        except EXPECTED as error:
            _report(failures, name, error)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    max_tiles = args.max_num if args.dynamic else 1
    options = {"batch_size": args.batch_size, "max_tiles": max_tiles, "workers": args.workers, "watchdog": watchdog}
    options["overwrite"] = args.overwrite_eval
    results: dict[str, list[dict | None]] = {name: [] for name in benchmarks}
    for candidate in candidates:
        chosen = {"attn_implementation": args.attn_implementation}
        chosen |= {"rope_precision": args.rope_precision} if args.rope_precision else {}
        load_model = _loader(candidate, device, dtype=DTYPES[precision], **chosen)
        figures = {"precision": precision, "max_tiles": max_tiles, **chosen}
        figures |= {} if args.score_only else checkpoint_settings(candidate.version, candidate.weights)
        settings = describe(figures, device)
        for name, benchmark in benchmarks.items():
            result = None
            if name in questions:
                predictions = Predictions(candidate.folder, name, questions[name])
                try:
                    if not args.score_only:
                        title = f"{candidate.label} {name}"
                        predict(load_model, benchmark, predictions, settings, title=title, **options)
                    result = distributed.on_main(partial(score, name, benchmark, predictions, candidate, data_dir))
                except EXPECTED as error:
                    _report(failures, f"{name}, {candidate.label}", error)
                except KeyboardInterrupt as error:
                    raise KeyboardInterrupt(_progress(results, predictions, candidate.label)) from error
            results[name].append(result)
        load_model.cache_clear()  # the next model takes its place
        if device.type == "cuda":
            torch.cuda.empty_cache()
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
    """What an interrupted run says, on its first rank: under another one the first may be joining the files."""
    if not distributed.is_main():
        return "interrupted"
    done = [f"{name} ({result['model']})" for name, per_model in results.items() for result in per_model if result]
    answered = f"{len(predictions.read())} of {len(predictions.questions)} questions of {predictions.name} ({label})"
    return f"interrupted; done: {', '.join(done) or 'none'}; {answered}. The same command continues from there"


def _report(failures: dict[str, str], what: str, error: Exception) -> None:
    failures[what] = f"{told(error)} ({README})"
    if distributed.is_main():
        print(f"error: {what}: {failures[what]}", file=sys.stderr, flush=True)


def _loader(candidate: Candidate, device: torch.device, **options: Any):
    """Loads model and processor at the first call: a run whose questions are all answered needs neither."""

    @cache
    def load() -> tuple[Self1EForSegmentation, Self1EProcessor]:
        try:
            processor = Self1EProcessor.from_pretrained(candidate.version)
            model = Self1EForSegmentation.from_pretrained(candidate.version, weights=candidate.weights, **options)
        except EXPECTED as error:
            raise CannotLoad(f"cannot load {candidate.label}: {error}") from error
        model.generation_config = GenerationConfig()  # a checkpoint's own penalties would bend greedy search
        return model.to(device).eval(), processor

    return load


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say; returns the exit code, 1 when a benchmark failed."""
    distributed.start("gloo", timeout=TIMEOUT)  # ranks exchange small objects only, on any kind of device
    device = distributed.device(args.device)
    if distributed.is_main():
        for candidate in args.candidates:
            check_writable(candidate.folder)
            weights = candidate.weights or "its own weights"
            print(f"{candidate.label}: {candidate.version}, {weights} -> {candidate.folder}", flush=True)
    run_dir = args.log_base_dir / args.exp_name
    with Watchdog(run_dir / ".ranks" / "eval_vqa", args.timeout) as watchdog:
        failures = evaluate(args, run_dir / "eval_vqa", device, watchdog)
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command line `argv`; returns the exit code."""
    return start(parse_args(argv))


def start(args: argparse.Namespace) -> int:
    """As `main`, from flags that are parsed already."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked

    def program() -> int:
        try:
            return run(args)
        except KeyboardInterrupt as interruption:
            words = interruption.args or ("interrupted before the first question; the same command continues",)
            raise KeyboardInterrupt(*words) from None

    return distributed.run_program(program, expected=(*EXPECTED, CannotLoad))
