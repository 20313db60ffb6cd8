"""Train and compare variants of the method on the shapes benchmark, over seeds, with the ordinary training program.

    self1e ablate --suite method attention replication auxiliary --seeds 3      # 20 to 30 min on 2 free CPU cores
    self1e ablate --suite method --seeds 1 --budget 10                          # for a look

Suites (the last row is the full method, trained once for all of them):
    method        baseline, replication, RFR, RFA
    attention     causal, image, image+seg
    replication   window, interpolate, tile
    auxiliary     without, with the auxiliary loss

A model of a million parameters first learns "all shapes" and stays there for hundreds of steps. Every row therefore
starts from one shared checkpoint that has left this plateau on simpler scenes, with causal attention and tiles. It was
trained for both ends of the suite `method` at once: it is the full method, but that the auxiliary mask of every other
sentence is the baseline's mask, so that neither starts behind the other. Rows without RFA drop its head and keep the
rest. A row then trains on the benchmark, and only the switches of its `configs/ablation_*.yaml` and the seed (order
of the data) differ.

OUTPUT/<row>_<seed> holds the units of a finished row (JSONL) and its loss curve. The command can be stopped and
started again: finished rows are kept. OUTPUT/report holds tables (Markdown and JSON) and pictures. A machine with two
cores trains two rows at a time, each on one thread; a row's digits do not depend on that.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from self1e.apps.ablation.suites import FULL, SUITES
from self1e.files import replacing_folder, write_json
from self1e.flags import Parser, between, check_writable, whole

ROOT = Path(__file__).resolve().parents[3]
HEADLESS = ("baseline", "replication", "rfr")
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Settings:
    """What all rows of an OUTPUT folder have in common.

    Training scenes, held-out scenes per family, pixels, optimizer steps and peak rates of warm-up and rows, photos per
    step.
    """

    train: int = 2000
    val: int = 25
    size: int = 112
    warmup_steps: int = 600
    warmup_lr: float = 1.5e-3
    steps: int = 200
    lr: float = 1e-3
    batch_size: int = 8


def train(folder: Path, version: Path, flags: list[str], settings: Settings, *, steps: int, lr: float, measure: str):
    """Train in `folder`, measuring on the benchmark folder `measure` if any. Raises ValueError with the log's end."""
    command = [
        sys.executable, "-m", "self1e.apps.ablation.row", str(folder), measure, "--version", str(version), *flags,
        "--dataset", "refer_seg", "--epochs", "1000", "--batch_size", str(settings.batch_size),
        "--grad_accumulation_steps", "1", "--optimize_vision", "--precision", "fp32", "--lr", str(lr),
        "--vision_lr", str(lr), "--max_steps", str(steps), "--warmup_steps", str(min(50, steps // 6)),
        "--print_freq", str(max(1, min(20, steps // 2))), "--save_steps", str(steps), "--workers", "0", "--no_eval",
        "--report_to", "none",
    ]  # fmt: skip
    log = folder / "log.txt"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w", encoding="utf-8") as output:
        surroundings = {**os.environ, **SURROUNDINGS, "PYTHONPATH": path}
        ended = subprocess.run(command, stdout=output, stderr=output, env=surroundings, check=False)
    if ended.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        raise ValueError(f"training ended with code {ended.returncode}:\n{tail}")


def prepare(output: Path, settings: Settings) -> None:
    """The base model, both trees and the shared checkpoint. Raises ValueError where `output` has other settings."""
    record = output / "settings.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != asdict(settings):
        raise ValueError(f"{record} differs from the flags given: give another --output, or the same flags")
    if not record.is_file():
        from self1e.synthetic.benchmark import make_benchmark
        from self1e.synthetic.shapes_dataset import make_shapes_dataset
        from self1e.synthetic.tiny_internvl import make_tiny_internvl

        make_tiny_internvl(output / "base", image_size=settings.size)
        make_shapes_dataset(output / "shapes", train=settings.train, val=2, size=settings.size, simple=True)
        make_benchmark(output / "benchmark", train=settings.train, val=settings.val, size=settings.size, progress=True)
        write_json(record, asdict(settings))
    if not (output / "warmup").is_dir():
        flags = ["--dataset_dir", str(output / "shapes/dataset"), "--refer_seg_data", "refcoco"]
        flags += ["--attention_pathway", "causal"]
        steps, lr = settings.warmup_steps, settings.warmup_lr
        with replacing_folder(output / "warmup") as partial:
            train(partial, output / "base", flags, settings, steps=steps, lr=lr, measure="")
            drop_head(partial / "run/ckpt_model", partial / "headless")


def drop_head(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint of the full method without its head, as a model of the row `baseline`."""
    from safetensors.torch import load_file, save_file

    from self1e.model.weights import CHECKSUMS

    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(CHECKSUMS))  # the weights change
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("segmentation_head.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"mask_features": "baseline"})


def train_row(row: str, seed: int, output: Path, settings: Settings) -> None:
    """Train and measure one row; its folder appears when all is done."""
    flags = ["--dataset_dir", str(output / "benchmark/train"), "--refer_seg_data", "grefcoco", "--seed", str(seed)]
    flags += [] if row == FULL else ["--config", str(ROOT / "configs" / f"ablation_{row}.yaml")]
    if row not in SUITES["attention"] or row == FULL:
        flags += ["--attention_pathway", "image+seg"]  # the shared checkpoint is causal
    started = time.monotonic()
    with replacing_folder(output / f"{row}_{seed}") as partial:
        warmup = output / "warmup" / ("headless" if row in HEADLESS else "run/ckpt_model")
        benchmark = str(output / "benchmark")
        train(partial, warmup, flags, settings, steps=settings.steps, lr=settings.lr, measure=benchmark)
        write_json(partial / "row.json", {"row": row, "seed": seed, "seconds": round(time.monotonic() - started)})


def run(
    suites: Sequence[str], seeds: int, output: Path, settings: Settings, *, jobs: int, budget: float | None
) -> bool:
    """Train what is missing, as far as the budget (minutes) reaches, and write the report; True when all is there."""
    started = time.monotonic()
    prepare(output, settings)
    wanted = list(dict.fromkeys((row, seed) for seed in range(seeds) for suite in suites for row in SUITES[suite]))

    def missing() -> list[tuple[str, int]]:
        return [(row, seed) for row, seed in wanted if not (output / f"{row}_{seed}").is_dir()]

    def work(row: str, seed: int) -> None:
        if budget is None or time.monotonic() - started < 60 * budget:
            train_row(row, seed, output, settings)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, *key) for key in missing()]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="rows"):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    from self1e.apps.ablation.report import write_report

    print(write_report(output, suites, seeds))
    if left := missing():
        print(f"{len(left)} of {len(wanted)} rows are not trained yet; the same command continues", file=sys.stderr)
    return not missing()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when every row is there, 1 when the budget ended before. Errors are for `flags.guarded`."""
    parser = Parser(prog="self1e ablate", description=__doc__)
    add = parser.add_argument
    add("--suite", nargs="+", choices=tuple(SUITES), default=list(SUITES), help="default: all of them")
    add("--seeds", type=whole(1), default=3, help="runs of each row")
    add("--budget", type=between(0, included=True), metavar="MINUTES", help="no row is started after this time")
    add("--output", type=Path, default=Path("runs/ablation"), help="a folder for all files")
    add("--jobs", type=whole(1), default=os.cpu_count() or 1, help="rows trained at a time, one thread each")
    add("--steps", type=whole(1), default=Settings.steps, help="optimizer steps of a row")
    add("--warmup_steps", type=whole(1), default=Settings.warmup_steps, help="of the shared checkpoint")
    add("--train", type=whole(2), default=Settings.train, help="training scenes")
    add("--val", type=whole(2), default=Settings.val, help="held-out scenes per family")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the report's pictures need matplotlib: pip install 'self1e[plots]'")
    settings = Settings(train=args.train, val=args.val, warmup_steps=args.warmup_steps, steps=args.steps)
    check_writable(args.output)
    try:
        done = run(args.suite, args.seeds, args.output, settings, jobs=args.jobs, budget=args.budget)
    except KeyboardInterrupt:
        kept = "finished rows are kept, the same command continues"
        raise KeyboardInterrupt(f"stopped; {kept}") from None
    return 0 if done else 1
