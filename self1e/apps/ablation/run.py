"""Train and compare variants of the method on the shapes benchmark, over seeds, with the ordinary training program.

    self1e ablate --suite method attention replication auxiliary --seeds 3      # about 1.5 h on 2 CPU cores
    self1e ablate --suite method --seeds 1 --budget 10                          # for a look

Suites (the last row is the full method):
    method        baseline, replication, RFR, RFA
    attention     causal, image, image+seg
    replication   window, interpolate, tile
    auxiliary     without, with the auxiliary loss

A model of a million parameters first learns "all shapes" and stays there for hundreds of steps. Every row of a suite
therefore starts from one shared checkpoint that has left this plateau on simpler scenes. The warm-up of the suite
`method` is the row `baseline` (causal attention, no head), so that no row starts with a part of the method; the other
suites start from the full method with causal attention. A row then trains on the benchmark, and only the switches of
its `configs/ablation_*.yaml` and the seed (order of the data, a fresh head) differ.

OUTPUT/<warm-up>_<row>_<seed> holds the units of a finished row (JSONL) and its loss curve. The command can be stopped
and started again: finished rows are kept. OUTPUT/report holds tables (Markdown and JSON) and pictures. A machine with
two cores trains two rows at a time, each on one thread; a row's digits do not depend on that.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from self1e.apps.ablation.report import write_report
from self1e.apps.ablation.suites import FULL, SUITES
from self1e.files import replacing_folder, write_json
from self1e.synthetic.benchmark import make_benchmark
from self1e.synthetic.shapes_dataset import make_shapes_dataset
from self1e.synthetic.tiny_internvl import make_tiny_internvl

ROOT = Path(__file__).resolve().parents[3]
WARMUP_FLAGS = {  # what the starting checkpoint of a suite is trained with
    "plain": ["--mask_features", "baseline", "--attention_pathway", "causal"],
    "causal": ["--attention_pathway", "causal"],
}
LOSSES = ("ce", "mask_bce", "mask_dice")


def warmup_of(suite: str) -> str:
    return "plain" if suite == "method" else "causal"


@dataclass(frozen=True)
class Settings:
    """What all rows of an OUTPUT folder have in common. Sizes are scenes, pixels, optimizer steps."""

    train: int = 2000
    val: int = 60
    size: int = 112
    warmup_steps: int = 700
    steps: int = 400
    lr: float = 1e-3
    batch_size: int = 8


def train(
    version: Path, data: list[str], flags: list[str], folder: Path, *, settings: Settings, steps: int, seed: int
):
    """Run the training program in `folder`; its output goes to `folder`/train.log. Raises RuntimeError naming it."""
    command = [
        sys.executable, str(ROOT / "train_hf_ivl_seq.py"), "--version", str(version), *data, *flags,
        "--dataset", "refer_seg", "--epochs", "1000", "--batch_size", str(settings.batch_size),
        "--grad_accumulation_steps", "1", "--optimize_vision", "--precision", "fp32", "--lr", str(settings.lr),
        "--vision_lr", str(settings.lr), "--max_steps", str(steps), "--warmup_steps", str(min(50, steps // 8)),
        "--print_freq", str(max(1, min(20, steps // 2))), "--save_steps", str(steps), "--workers", "0", "--no_eval",
        "--seed", str(seed), "--report_to", "none", "--exp_name", "run", "--log_base_dir", str(folder),
    ]  # fmt: skip
    call(command, folder / "train.log")


def call(command: list[str], log: Path) -> None:
    """Run a program on one thread of a CPU. Raises RuntimeError with the last lines of its log when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    surroundings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as output:
        ended = subprocess.run(
            command, stdout=output, stderr=output, env={**os.environ, **surroundings, "PYTHONPATH": path}, check=False
        )
    if ended.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command[:2])} ended with code {ended.returncode}; see {log}:\n{tail}")


def curve(run: Path) -> list[dict[str, Any]]:
    """Step and loss terms at every logged step of a run, from the Trainer's own record."""
    (state,) = run.glob("checkpoints/checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return [{name: entry[name] for name in ("step", *LOSSES)} for entry in history if "mask_dice" in entry]


def warm_up(name: str, output: Path, settings: Settings) -> Path:
    """The checkpoint that the rows of a suite start from; trained unless it is there."""
    folder = output / f"warmup_{name}"
    if not folder.is_dir():
        shapes = output / "shapes"
        data = ["--dataset_dir", str(shapes / "dataset"), "--refer_seg_data", "refcoco"]
        with replacing_folder(folder) as partial:
            train(
                output / "base",
                data,
                WARMUP_FLAGS[name],
                partial,
                settings=settings,
                steps=settings.warmup_steps,
                seed=0,
            )
            write_json(partial / "curve.json", curve(partial / "run"))
    return folder / "run" / "ckpt_model"


def train_row(warmup: str, row: str, seed: int, output: Path, settings: Settings) -> None:
    """Train and measure one row; the folder appears when all is done."""
    flags = [] if row == FULL else ["--config", str(ROOT / "configs" / f"ablation_{row}.yaml")]
    if row not in SUITES["attention"] or row == FULL:
        flags += ["--attention_pathway", "image+seg"]  # the warm-up is causal; a row without the switch is not
    if row not in SUITES["method"] or row == FULL:
        flags += ["--mask_features", "rfa"]
    started = time.monotonic()
    with replacing_folder(output / f"{warmup}_{row}_{seed}") as partial:
        data = ["--dataset_dir", str(output / "benchmark/train"), "--refer_seg_data", "grefcoco"]
        version = output / f"warmup_{warmup}/run/ckpt_model"
        train(version, data, flags, partial, settings=settings, steps=settings.steps, seed=seed)
        units = ["--benchmark", str(output / "benchmark"), "--output", str(partial / "units.jsonl")]
        model = ["--model", str(partial / "run/ckpt_model")]
        call([sys.executable, "-m", "self1e.apps.ablation.measure", *model, *units], partial / "measure.log")
        write_json(partial / "curve.json", curve(partial / "run"))
        write_json(partial / "row.json", {"row": row, "seed": seed, "seconds": round(time.monotonic() - started)})


def prepare(output: Path, settings: Settings) -> None:
    """The base model and both trees. Raises ValueError where `output` belongs to other settings."""
    record = output / "settings.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != asdict(settings):
        raise ValueError(f"{record} differs from the flags given: give another --output, or the same flags")
    if not record.is_file():
        make_tiny_internvl(output / "base", image_size=settings.size)
        make_shapes_dataset(output / "shapes", train=settings.train, val=2, size=settings.size, simple=True)
        make_benchmark(output / "benchmark", train=settings.train, val=settings.val, size=settings.size, progress=True)
        write_json(record, asdict(settings))


def run(
    suites: Sequence[str], seeds: int, output: Path, settings: Settings, *, jobs: int, budget: float | None
) -> bool:
    """Train what is missing, as far as the budget (minutes) reaches, and write the report; True when all is there."""
    started = time.monotonic()
    prepare(output, settings)
    with ThreadPoolExecutor(jobs) as pool:
        warmups = dict.fromkeys(warmup_of(suite) for suite in suites)
        list(pool.map(lambda name: warm_up(name, output, settings), warmups))
        wanted = dict.fromkeys(
            (warmup_of(suite), row, seed) for seed in range(seeds) for suite in suites for row in SUITES[suite]
        )
        missing = [key for key in wanted if not (output / "{}_{}_{}".format(*key)).is_dir()]

        def work(key: tuple[str, str, int]) -> None:
            if budget is None or time.monotonic() - started < 60 * budget:
                train_row(*key, output, settings)

        futures = [pool.submit(work, key) for key in missing]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="rows"):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    finished = [key for key in wanted if (output / "{}_{}_{}".format(*key)).is_dir()]
    print(write_report(output, suites, {suite: warmup_of(suite) for suite in suites}, seeds))
    if len(finished) < len(wanted):
        print(f"{len(finished)} of {len(wanted)} rows are trained; the same command continues", file=sys.stderr)
    return len(finished) == len(wanted)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when every row is there, 1 when the budget ended before or a row failed."""
    parser = argparse.ArgumentParser(
        "self1e ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", choices=tuple(SUITES), default=list(SUITES), help="default: all of them")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="no row is started after this time")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="a folder for all files")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="rows trained at a time, one thread each"
    )
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps of a row")
    parser.add_argument("--warmup_steps", type=int, default=Settings.warmup_steps, help="of the shared checkpoints")
    parser.add_argument("--train", type=int, default=Settings.train, help="training scenes")
    parser.add_argument("--val", type=int, default=Settings.val, help="held-out scenes per family")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs", "steps", "warmup_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is below 1")
    settings = Settings(train=args.train, val=args.val, warmup_steps=args.warmup_steps, steps=args.steps)
    try:
        done = run(args.suite, args.seeds, args.output, settings, jobs=args.jobs, budget=args.budget)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"self1e ablate: {error}", file=sys.stderr)
        return 1
    return 0 if done else 1
