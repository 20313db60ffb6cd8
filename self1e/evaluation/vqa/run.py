"""Evaluate models on VQA benchmarks, on one process or several: `self1e eval vqa`, behind `eval_vqas.sh`.

Replies go to LOG_BASE_DIR/EXP_NAME/eval_vqa as they are produced, one line per question. Scores, the official
programs' result files (official/) and the summary are computed from these files alone. An interrupted run continues
where it stopped.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import GenerationConfig

from self1e import distributed
from self1e.data.samples import check_texts, inside, naming
from self1e.errors import UserError, check_known
from self1e.evaluation.loop import WAIT
from self1e.evaluation.results import (
    checkpoint_folder,
    claim_folder,
    evaluated,
    make_settings,
    markdown_table,
    weights_identity,
)
from self1e.evaluation.vqa import gqa, mmbench, mme, open_ended, pope
from self1e.evaluation.vqa.base import Answer, Question, Scores, VQABenchmark
from self1e.evaluation.vqa.generation import answer_questions, replies_of
from self1e.files import check_writable, read_json, write_json, write_text
from self1e.flags import DTYPES, Help, precision_on
from self1e.model.config import SWITCHES
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processor import Self1EProcessor
from self1e.model.prompts import IMAGE_TAG
from self1e.stop import stop_requests

VQA_BENCHMARKS: dict[str, VQABenchmark] = (  # one more is a module with `BENCHMARKS`
    open_ended.BENCHMARKS | gqa.BENCHMARKS | pope.BENCHMARKS | mme.BENCHMARKS | mmbench.BENCHMARKS
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("self1e eval vqa", None, __doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("--version", type=checkpoint_folder, metavar="V",
        help="model folder, run folder or hub id; unset: the run's own ckpt_model")
    add("--model_weights", type=checkpoint_folder, metavar="W",
        help="weights over --version; unset: the run's ckpt_model if it is there, else the version's own")
    add("--exp_name", required=True, help="results go to <log_base_dir>/<exp_name>/eval_vqa")
    add("--log_base_dir", type=Path, default=Path("runs"), help="folder of all runs")
    add("--data_dir", type=Path, default=Path("data"), help="InternVL's data folder; `data/` in image paths means it")
    add("--datasets", nargs="+", default=[], metavar="NAME",
        help=f"benchmarks, separated by blanks; unset: all of {', '.join(VQA_BENCHMARKS)}")
    add("--dynamic", action="store_true", help="cut photos to tiles, InternVL's rule, and add a thumbnail")
    add("--max_num", type=int, default=6, help="the most tiles per photo with --dynamic, without the thumbnail")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="unset: bf16 on a GPU, fp32 on a CPU")
    add("--rope_precision", **SWITCHES["rope_precision"])
    add("--device", choices=("auto", "cpu", "cuda", "gpu"), default="auto", help="where to compute")
    add("--batch_size", type=int, default=8, help="questions per forward pass of a process")
    add("--workers", type=int, help="processes per rank that decode and tile photos; unset: as the cores allow")
    add("--allow_outside", action="store_true", help="take photos that question files name outside --data_dir")
    add("--timeout", type=float, default=1800.0, help="seconds in which a worker must have read a batch")
    add("--score_only", action="store_true", help="score the replies that are on disk; no model is loaded")
    add("--overwrite_eval", action="store_true", help="ask the questions anew, and delete replies of other settings")
    # fmt: on
    args = parser.parse_args(argv)
    args.datasets = " ".join(args.datasets).split() or [*VQA_BENCHMARKS]
    check_known("unknown VQA benchmark", args.datasets, VQA_BENCHMARKS)
    args.max_tiles = args.max_num if args.dynamic else 1
    args.run_dir = args.log_base_dir / args.exp_name
    args.version = evaluated(args.run_dir, args.version, args.model_weights)
    if args.version is None and not args.score_only:
        raise UserError(f"{args.run_dir} holds no trained model (ckpt_model): name one with --version")
    args.workers = distributed.share_cores(args.workers)
    return args


def read_questions(name: str, args: argparse.Namespace) -> list[Question]:
    """The questions of a benchmark. Raises UserError for what is wrong with its files, before the long work starts.

    No text holds a control token, no photo is missing or outside the folder, and blank replies can be scored.
    """
    benchmark = VQA_BENCHMARKS[name]
    questions = benchmark.questions(args.data_dir)
    for question in questions:  # which may say where its photo belongs
        with naming(f"question {question.id}"):
            check_texts([question.prompt.replace(IMAGE_TAG, "", 1)])
    paths = {q.image: q.id for q in questions if isinstance(q.image, Path) and not args.score_only}
    for path, id in paths.items():
        photo = path.relative_to(args.data_dir) if path.is_relative_to(args.data_dir) else path.absolute()
        with naming(f"question {id}"):
            inside(args.data_dir, str(photo), allow_outside=args.allow_outside)
    if absent := sorted(path for path in paths if not path.is_file()):
        raise UserError(f"{absent[0]} is missing, one of {len(absent)} missing photos")
    if benchmark.metric is not None:
        benchmark.metric([Answer(question, "") for question in questions], args.data_dir)
    return questions


def score(name: str, folder: Path, questions: Sequence[Question], data_dir: Path) -> None:
    """Score one benchmark from its replies on disk; writes `<name>.scores.json` and the official result files."""
    benchmark, replies = VQA_BENCHMARKS[name], replies_of(folder, name, questions)
    records = replies.read()
    if len(records) < len(questions):
        counts = f"{len(records)} of {len(questions)} questions"
        raise UserError(f"{replies.path} answers {counts}; run without --score_only")
    answers = [Answer(question, records[index]["answer"]) for index, question in enumerate(questions)]
    benchmark.export(answers, folder / "official")
    scores = benchmark.metric(answers, data_dir) if benchmark.metric else Scores({}, {})  # the server's
    write_json(folder / f"{name}.scores.json", {"benchmark": name, "n": len(answers)} | vars(scores))


def write_summary(folder: Path, run: str, faults: dict[str, str]) -> None:
    """`summary.md` and `summary.json` of all benchmarks that the folder holds; prints the first figure of each."""
    paths = {name: folder / f"{name}.scores.json" for name in VQA_BENCHMARKS}
    results = {name: read_json(path, dict) for name, path in paths.items() if path.is_file()}
    figures = {name: scores["summary"] for name, scores in results.items()}
    write_json(folder / "summary.json", {"figures": figures, "failures": faults})
    lines, first = [], []
    for name, scores in results.items():
        own = [[name, figure, f"{value:.2f}"] for figure, value in scores["summary"].items()]
        own = own or [[name, "-", "server"]]  # which takes the file in official/
        lines += own
        first += own[:1]
    header, unit = ["benchmark", "figure", run], "\nPercent, unless the figure names points.\n"
    write_text(folder / "summary.md", markdown_table(header, lines, text_columns=2) + unit)
    print(f"{markdown_table(header, first, text_columns=2)}{unit}\nall figures are in {folder / 'summary.md'}")


def load_model(args: argparse.Namespace, folder: Path) -> tuple[Self1EForSegmentation, Self1EProcessor]:
    """The model that answers; `folder` is claimed for its replies."""
    device = distributed.device(args.device)
    precision = args.precision or precision_on(device)
    options = {"rope_precision": args.rope_precision} if args.rope_precision else {}  # unset: the checkpoint's
    weights = weights_identity(args.version, args.model_weights)
    settings = make_settings(weights, precision=precision, max_tiles=args.max_tiles, **options)
    distributed.on_main(partial(claim_folder, folder, settings, overwrite=args.overwrite_eval))
    options |= {"weights": args.model_weights, "dtype": DTYPES[precision]}
    model = Self1EForSegmentation.from_pretrained(args.version, **options).to(device).eval()
    model.generation_config = GenerationConfig()  # a checkpoint's own penalties would bend greedy search
    return model, Self1EProcessor.from_pretrained(args.version)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command line `argv`; returns the exit code, 1 when a benchmark's files are at fault."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    args = parse_args(argv)
    folder = args.run_dir / "eval_vqa"
    distributed.start("gloo", timeout=WAIT)  # ranks exchange small objects only, on any kind of device
    if distributed.is_main():
        check_writable(folder)
    replies = "the replies on disk" if args.score_only else args.model_weights or args.version
    distributed.say(f"evaluating {replies} -> {folder}")
    questions, faults = {}, {}
    for name in args.datasets:
        try:
            questions[name] = read_questions(name, args)
        except UserError as error:
            faults[name] = str(error)
            if distributed.is_main():
                print(f"error: {name}: {error} (data/README.md says what goes where)", file=sys.stderr, flush=True)
    if not questions:
        raise UserError(f"nothing was evaluated: no benchmark has its files in {args.data_dir} (--data_dir)")
    with stop_requests(args.run_dir) as asked_to_stop:
        model, processor = (None, None) if args.score_only else load_model(args, folder)
        for name, asked in questions.items():
            if model is not None:
                results = replies_of(folder, name, asked)
                results.open(overwrite=args.overwrite_eval)
                answer_questions(
                    model, processor, asked, results, max_new_tokens=VQA_BENCHMARKS[name].max_new_tokens,
                    max_tiles=args.max_tiles, batch_size=args.batch_size, workers=args.workers,
                    timeout=args.timeout, asked_to_stop=asked_to_stop, title=name,
                )  # fmt: skip
            if distributed.is_main():
                score(name, folder, asked, args.data_dir)
    if distributed.is_main():
        write_summary(folder, args.exp_name, faults)
    return 1 if faults else 0
