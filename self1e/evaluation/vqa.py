"""Evaluate models on VQA benchmarks; started by `eval_vqas.sh`, on one process or under torchrun.

Replies go to `<log_base_dir>/<exp_name>/eval_vqa/<benchmark>.jsonl` as they are produced, one line a question; scores,
the official programs' result files (`official/`) and the summary are computed from these files alone. An interrupted
run continues where it stopped.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import GenerationConfig

from self1e.data.sample import SampleError
from self1e.evaluation.runtime import Ranks, fingerprint, markdown_table, trained_weights, write_text
from self1e.evaluation.vqa_benchmarks import VQA_BENCHMARKS, Answer, Benchmark, Question, get_vqa_benchmarks
from self1e.modeling import Self1EForSegmentation
from self1e.processing import Self1EProcessor

README = "README, section Evaluate"
SEPARATOR = "<|im_end|>"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OWN_WEIGHTS = "none"


# ---------------------------------------------------------------------------------------------------------------------
# Answering


def make_batches(questions: Sequence[Question], indices: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of `size`, questions of one photo next to each other (it is encoded once a batch)."""
    by_image: dict[Any, list[int]] = {}
    for index in indices:
        by_image.setdefault(questions[index].image, []).append(index)
    order = list(chain.from_iterable(by_image.values()))
    return [order[start : start + size] for start in range(0, len(order), size)]


class _Prompts(Dataset):
    """Batch number -> (question indices, left-padded model inputs).

    A broken photo or text comes back as its error for the main process to raise: a worker would bury it.
    """

    def __init__(self, questions: Sequence[Question], batches: list[list[int]], processor, tiling: dict):
        self.questions, self.batches, self.processor, self.tiling = questions, batches, processor, tiling

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[int], dict] | Exception:
        rows: dict[Any, list[list[str]]] = {}
        photos = {}
        for index in self.batches[number]:
            question = self.questions[index]
            if question.image not in photos:
                try:
                    photos[question.image] = question.open_image()
                except SampleError as error:
                    return ValueError(str(error))
            text = question.prompt if "<image>" in question.prompt else f"<image>\n{question.prompt}"
            rows.setdefault(question.image, []).append([text])
        try:
            batch = self.processor(list(photos.values()), list(rows.values()), padding_side="left", **self.tiling)
        except ValueError as error:  # a reserved token in the text
            return error
        del batch["labels"]
        return self.batches[number], dict(batch)


def _as_is(item: Any) -> Any:
    return item


@torch.inference_mode()
def generate_replies(model, tokenizer, batch: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    """Greedy replies to the rows of a left-padded batch, each as if it were asked alone.

    At least one token, at most `max_new_tokens`, ended by `<|im_end|>`; special tokens dropped, cut at the first
    separator, stripped (InternVL's `chat`).
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    ids = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        min_new_tokens=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.convert_tokens_to_ids(SEPARATOR),
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.split(SEPARATOR)[0].strip() for text in texts]


def answer_questions(
    model,
    processor,
    questions: Sequence[Question],
    indices: Sequence[int],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    max_tiles: int = 1,
    workers: int = 0,
    progress: str | None = None,
) -> Iterator[tuple[list[int], list[str]]]:
    """Replies to `questions[i]`, i in `indices`, batch by batch: (their indices, replies).

    Args:
        max_tiles: 1 for the one resized image, more for InternVL's dynamic tiling with a thumbnail.
        workers: processes that decode and tile.
        progress: title of a bar; None for none.

    Raises:
        ValueError: a photo cannot be decoded, or a text holds a reserved token; the message names it.
    """
    batches = make_batches(questions, indices, batch_size)
    tiling = {"max_tiles": max_tiles, "thumbnail": max_tiles > 1}
    loader = DataLoader(
        _Prompts(questions, batches, processor, tiling),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=min(workers, len(batches)),
        generator=torch.Generator(),
    )
    with tqdm(total=len(indices), desc=progress, unit="question", disable=progress is None) as bar:
        for item in loader:
            if isinstance(item, Exception):
                raise item
            asked, batch = item
            yield asked, generate_replies(model, processor.tokenizer, batch, max_new_tokens)
            bar.update(len(asked))


# ---------------------------------------------------------------------------------------------------------------------
# Predictions on disk


class Predictions:
    """The replies to one benchmark, on disk: `<name>.jsonl` in file order, `<name>.rank<r>.jsonl` while they are made.

    A line: `index` (place in the question file), `question_id`, `prompt`, `answer`. `<name>.settings.json` says what
    produced them; replies of other settings are never mixed in or reused.
    """

    def __init__(self, folder: Path, name: str, questions: Sequence[Question]):
        self.path, self.settings_path = folder / f"{name}.jsonl", folder / f"{name}.settings.json"
        self.questions = questions

    def _rank_paths(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank*.jsonl"))

    def read(self) -> dict[int, str]:
        """Index -> reply. The last line of a file may be torn; anything else wrong raises ValueError with the fix."""
        replies = {}
        for path in [self.path, *self._rank_paths()]:
            lines = path.read_bytes().split(b"\n") if path.is_file() else []
            for number, line in enumerate(lines, 1):
                if not line:
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    if number == len(lines):  # no newline behind it: the run was stopped while writing
                        continue
                    raise ValueError(f"{path}, line {number} is not JSON ({error}); delete the file") from error
                index = row["index"]
                known = self.questions[index] if index < len(self.questions) else None
                if known is None or (row["question_id"], row["prompt"]) != (known.id, known.prompt):
                    raise ValueError(
                        f"{path}, line {number} answers another question than the data folder holds now; delete the "
                        "file or use another --exp_name"
                    )
                replies[index] = row["answer"]
        return replies

    def open(self, settings: dict) -> dict[int, str]:
        """Replies that are there already, after their files were joined to one. For one process only.

        Raises ValueError when they were made with other settings.
        """
        replies = self.read()
        if replies:
            before = json.loads(self.settings_path.read_text()) if self.settings_path.is_file() else {}
            differing = [key for key in settings if settings[key] != before.get(key)]
            if differing:
                changes = ", ".join(f"{key}: {before.get(key)} then, {settings[key]} now" for key in differing)
                raise ValueError(
                    f"{self.path} was made with other settings ({changes}); use the same ones, another --exp_name, "
                    f"or delete {self.path.stem}.*jsonl there"
                )
        write_text(self.settings_path, json.dumps(settings, indent=1) + "\n")
        self.join(replies)
        return replies

    def append(self, rank: int, asked: Sequence[int], replies: Sequence[str]) -> None:
        """Add replies of one rank to its own file."""
        with open(self.path.with_name(f"{self.path.stem}.rank{rank}.jsonl"), "a", encoding="utf-8") as file:
            file.write("".join(self._line(index, reply) for index, reply in zip(asked, replies)))

    def join(self, replies: dict[int, str]) -> None:
        """Write all replies to the one file, in file order, and drop the ranks' files. For one process only."""
        write_text(self.path, "".join(self._line(index, replies[index]) for index in sorted(replies)))
        for path in self._rank_paths():
            path.unlink()

    def _line(self, index: int, reply: str) -> str:
        question = self.questions[index]
        row = {"index": index, "question_id": question.id, "prompt": question.prompt, "answer": reply}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def answers(self) -> list[Answer]:
        """Every question with its reply, in file order. Raises ValueError when some are unanswered."""
        replies = self.read()
        if len(replies) < len(self.questions):
            raise ValueError(
                f"{self.path} answers {len(replies)} of {len(self.questions)} questions; run without --score_only"
            )
        return [Answer(question, replies[index]) for index, question in enumerate(self.questions)]


# ---------------------------------------------------------------------------------------------------------------------
# One run: models x benchmarks


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
    add("--version", nargs="+", action="extend", required=True, metavar="V",
        help="model folder or hub id; two for base and fine-tuned side by side (also as a repeated flag)")
    add("--model_weights", nargs="+", action="extend", default=[], metavar="W",
        help=f"weights over --version, one for each, or several over one; `{OWN_WEIGHTS}` = the version's own. "
        "Default: <log_base_dir>/<exp_name>/ckpt_model if it is there (with one --version), else the version's own")
    add("--exp_name", required=True, help="results go to <log_base_dir>/<exp_name>/eval_vqa")
    add("--log_base_dir", type=Path, default=Path("runs"))
    add("--data_dir", type=Path, default=Path("data"), help="InternVL's data folder; `data/` in image paths means it")
    add("--datasets", nargs="+", default=list(VQA_BENCHMARKS), metavar="NAME",
        help="benchmarks, separated by blanks, quoted or not; default: " + " ".join(VQA_BENCHMARKS))
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
