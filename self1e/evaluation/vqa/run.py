"""Evaluate models on VQA benchmarks, on one process or several: `self1e eval vqa`, behind `eval_vqas.sh`.

Replies go to LOG_BASE_DIR/EXP_NAME/eval_vqa as they are produced, one line per question. Scores, the official
programs' result files (official/) and the summary are computed from these files alone. An interrupted run continues
where it stopped.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import GenerationConfig

from self1e import distributed
from self1e.data.paths import inside
from self1e.data.samples import check_texts
from self1e.errors import UserError, check_known
from self1e.evaluation.loop import WAIT
from self1e.evaluation.results import claim_folder, make_settings
from self1e.evaluation.vqa.base import Answer, Question
from self1e.evaluation.vqa.generation import answer_questions, replies_of
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS
from self1e.evaluation.vqa.report import write_summary
from self1e.files import check_writable, write_json
from self1e.model.config import DTYPES, SWITCHES, check_source
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processor import Self1EProcessor
from self1e.model.prompts import IMAGE_TAG
from self1e.model.weights import checkpoint_folder, weights_identity
from self1e.stop import StopRequest

Questions = Mapping[str, list[Question]]  # of each benchmark


def find_model(version: str | None, weights: str | None, run_dir: Path) -> tuple[str, str | None, str]:
    """Version, weights over it or None, and the name of what is evaluated, by the rule that `--help` states."""
    trained = run_dir / "ckpt_model"
    if version is None and not (trained / "config.json").is_file():
        raise UserError(f"{run_dir} holds no trained model (ckpt_model): name one with --version")
    version = version or str(trained)
    if weights is None and trained.is_dir() and Path(version) != trained:
        weights = str(trained)
    path = Path(weights or version)
    path = path.resolve() if str(path).startswith(".") else path
    run = path.parent.name if path.name.startswith("ckpt_model") else ""  # runs/e/ckpt_model is e_ckpt_model
    return version, weights, f"{run}_{path.name}" if run else path.name


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="self1e eval vqa", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("--version", type=checkpoint_folder, metavar="V",
        help="model folder, run folder or hub id; unset: the run's own ckpt_model")
    add("--model_weights", type=checkpoint_folder, metavar="W",
        help="weights over --version; unset: the run's ckpt_model if it is there, else the version's own")
    add("--exp_name", required=True, help="results go to <log_base_dir>/<exp_name>/eval_vqa")
    add("--log_base_dir", type=Path, default=Path("runs"), help="folder of all runs")
    add("--data_dir", type=Path, default=Path("data"), help="InternVL's data folder; `data/` in image paths means it")
    add("--datasets", nargs="+", default=list(VQA_BENCHMARKS), metavar="NAME", help="benchmarks, separated by blanks")
    add("--dynamic", action="store_true", help="cut photos to tiles, InternVL's rule, and add a thumbnail")
    add("--max_num", type=int, default=6, help="the most tiles per photo with --dynamic, without the thumbnail")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="unset: bf16 on a GPU, fp32 on a CPU")
    add("--attn_implementation", default="sdpa", choices=("eager", "sdpa", "flash_attention_2"), help="of attention")
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
    if args.score_only and args.overwrite_eval:
        parser.error("--score_only scores the replies that --overwrite_eval drops: give one of them")
    if min(args.max_num, args.batch_size) < 1:
        parser.error("--max_num and --batch_size are at least 1")
    args.run_dir = args.log_base_dir / args.exp_name
    args.workers = distributed.share_cores(args.workers)
    return args


def check_questions(questions: Sequence[Question], data_dir: Path, *, photos: bool, allow_outside: bool) -> None:
    """Raise UserError for a control token in a text and, with `photos`, one that is missing or outside the folder."""
    for question in questions:  # which may say where its photo belongs
        check_texts(f"question {question.id}", [question.prompt.replace(IMAGE_TAG, "", 1)])
    paths = {question.image: question for question in questions if isinstance(question.image, Path) and photos}
    for path, question in paths.items() if not allow_outside else ():
        name = path.relative_to(data_dir) if path.is_relative_to(data_dir) else path.absolute()
        try:
            inside(data_dir, str(name))
        except UserError as error:
            raise UserError(f"question {question.id}: {error}") from error
    absent = sorted(path for path in paths if not path.is_file())
    if absent:
        raise UserError(f"{absent[0]} is missing, one of {len(absent)} missing photos")


def read_benchmarks(names: Sequence[str], data_dir: Path, **checks: bool) -> tuple[Questions, dict[str, str]]:
    """The questions of the benchmarks, and benchmark -> what is wrong with its files, before the long work starts.

    Blank replies are scored, which reads the references. checks: of `check_questions`.
    """
    found, faults = {}, {}
    for name in names:
        benchmark = VQA_BENCHMARKS[name]
        try:
            questions = benchmark.questions(data_dir)
            check_questions(questions, data_dir, **checks)
            if benchmark.metric is not None:
                benchmark.metric([Answer(question, "") for question in questions], data_dir)
            found[name] = questions
        except UserError as error:
            faults[name] = str(error)
    return found, faults


def score(name: str, folder: Path, model: str, questions: Sequence[Question], data_dir: Path) -> None:
    """Score one benchmark from its replies on disk; writes `<name>.scores.json` and the official result files."""
    benchmark, replies = VQA_BENCHMARKS[name], replies_of(folder, name, questions)
    records = replies.read()
    if len(records) < len(questions):
        counts = f"{len(records)} of {len(questions)} questions"
        raise UserError(f"{replies.path} answers {counts}; run without --score_only")
    answers = [Answer(question, records[index]["answer"]) for index, question in enumerate(questions)]
    benchmark.export(answers, folder / "official", model)
    scores = {"summary": {}, "details": {}, "notes": ["no local score: send the file in official/ to the server"]}
    if benchmark.metric is not None:
        scores = vars(benchmark.metric(answers, data_dir))
    write_json(folder / f"{name}.scores.json", {"benchmark": name, "model": model, "n": len(answers)} | scores)


def answer(args: argparse.Namespace, folder: Path, label: str, questions: Questions, stop: StopRequest) -> None:
    """Have the model answer what is unanswered, benchmark by benchmark, and score each."""
    device, max_tiles = distributed.device(args.device), args.max_num if args.dynamic else 1
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    options = {"attn_implementation": args.attn_implementation}
    options |= {"rope_precision": args.rope_precision} if args.rope_precision else {}  # unset: the checkpoint's
    weights = weights_identity(args.version, args.model_weights)
    settings = make_settings(weights, precision=precision, max_tiles=max_tiles, **options)
    distributed.on_main(partial(claim_folder, folder, settings, overwrite=args.overwrite_eval))
    options |= {"weights": args.model_weights, "dtype": DTYPES[precision]}
    model = Self1EForSegmentation.from_pretrained(args.version, **options).to(device).eval()
    processor = Self1EProcessor.from_pretrained(args.version)
    model.generation_config = GenerationConfig()  # a checkpoint's own penalties would bend greedy search
    for name, asked in questions.items():
        results = replies_of(folder, name, asked)
        results.open(overwrite=args.overwrite_eval)
        answer_questions(
            model, processor, asked, results, max_new_tokens=VQA_BENCHMARKS[name].max_new_tokens, max_tiles=max_tiles,
            batch_size=args.batch_size, workers=args.workers, timeout=args.timeout,
            asked_to_stop=lambda: stop.signal is not None, title=name,
        )  # fmt: skip
        if distributed.is_main():
            score(name, folder, label, asked, args.data_dir)


def run(args: argparse.Namespace) -> int:
    """Evaluate as the flags say; returns the exit code, 1 when a benchmark's files are at fault."""
    if args.version and not args.score_only:
        check_source(args.version)  # also one whose weights are replaced
    args.version, args.model_weights, model = find_model(args.version, args.model_weights, args.run_dir)
    names, folder = " ".join(args.datasets).split(), args.run_dir / "eval_vqa"
    check_known("unknown VQA benchmark", names, VQA_BENCHMARKS)
    distributed.start("gloo", timeout=WAIT)  # ranks exchange small objects only, on any kind of device
    if distributed.is_main():
        check_writable(folder)
    weights = args.model_weights or "its own weights"
    distributed.say(f"evaluating {model}: {args.version}, {weights} -> {folder}")
    checks = {"photos": not args.score_only, "allow_outside": args.allow_outside}
    questions, faults = read_benchmarks(names, args.data_dir, **checks)
    for name, fault in faults.items() if distributed.is_main() else ():
        print(f"error: {name}: {fault} (data/README.md says what goes where)", file=sys.stderr, flush=True)
    if not questions:
        raise UserError(f"nothing was evaluated: no benchmark has its files in {args.data_dir} (--data_dir)")
    with StopRequest(args.run_dir) as stop:
        if not args.score_only:
            answer(args, folder, model, questions, stop)
        elif distributed.is_main():
            for name, asked in questions.items():
                score(name, folder, model, asked, args.data_dir)
    if distributed.is_main():
        write_summary(folder, {"label": model, "version": args.version, "weights": args.model_weights}, faults)
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command line `argv`; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    return run(parse_args(argv))
