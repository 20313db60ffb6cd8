"""Train the quickstart with several seeds and lay the curves together: docs/evidence/healthy.json and healthy.png.

Command:  python scripts/healthy_curves.py --seeds 0 1 2 3 4      # needs the extra `train`
Cost:     5 minutes per seed on one free CPU core. Seeds that are finished are kept, so the command can be repeated.
Expected: the two files, cIoU of RefCOCO val per seed, and how many of these runs an alarm would have called ill.

The recipe is configs/quickstart.yaml, on the tiny model and the scenes that scripts/quickstart.sh makes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from self1e.files import read_json, write_json
from self1e.flags import guarded
from self1e.training.curves import draw_curves
from self1e.training.healthy import HealthyCurves, gather

ROOT = Path(__file__).resolve().parents[1]


def train(folder: Path, seeds: list[int]) -> list[Path]:
    """The `curves.json` of one run per seed below `folder`; what is not there yet is made."""
    os.environ |= {"SELF1E_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    self1e = [sys.executable, "-m", "self1e"]
    if not (folder / "base").is_dir():
        subprocess.run([*self1e, "make-tiny", folder / "base"], check=True)
    if not (folder / "shapes").is_dir():
        scenes = ["--simple", "--size", "112", "--val", "50"]
        subprocess.run([*self1e, "make-shapes", folder / "shapes", *scenes], check=True)
    for seed in seeds:
        if not (folder / f"seed_{seed}" / "curves.json").is_file():
            flags = {
                "config": ROOT / "configs/quickstart.yaml",
                "version": folder / "base",
                "dataset_dir": folder / "shapes/dataset",
                "data_dir": folder / "shapes/data",
                "log_base_dir": folder,
                "exp_name": f"seed_{seed}",
                "seed": seed,
            }
            words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
            subprocess.run([sys.executable, ROOT / "train_hf_ivl_seq.py", *words, "--overwrite"], check=True)
    return [folder / f"seed_{seed}" / "curves.json" for seed in seeds]


def called_ill(healthy: HealthyCurves, name: str, margin: float) -> list[int]:
    """The seeds whose curve leaves, at one step at least, the band of the other seeds.

    margin: how far the band is widened, up and down, in its own widths.
    """
    values, found = healthy.curves[name]["values"], []
    for place, seed in enumerate(healthy.seeds):
        others = list(zip(*(curve for other, curve in enumerate(values) if other != place)))
        bands = [(min(row), max(row), margin * (max(row) - min(row))) for row in others]
        if any(not low - more <= value <= high + more for value, (low, high, more) in zip(values[place], bands)):
            found.append(seed)
    return found


def draw(healthy: HealthyCurves, path: Path) -> None:
    """The mean over seeds as a line, with the band."""
    lines: dict[int, dict] = {}
    for name in healthy.curves:
        band = healthy.band(name)
        assert band is not None
        for step, value in zip(band.steps, band.mean):
            lines.setdefault(step, {"step": step})[name] = value
    draw_curves([lines[step] for step in sorted(lines)], path, healthy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/healthy", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/evidence", help="folder of the two files")
    args = parser.parse_args()
    try:
        runs = [read_json(path, dict) for path in train(args.runs.resolve(), args.seeds)]
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; finished seeds are kept, the same command continues") from None
    write_json(args.output / "healthy.json", gather(runs), indent=None)
    healthy = HealthyCurves(args.output / "healthy.json")
    draw(healthy, args.output / "healthy.png")
    (score,) = (name for name in healthy.curves if name.endswith("_ciou"))
    for seed, values in zip(healthy.seeds, healthy.curves[score]["values"]):
        print(f"seed {seed}: {score.removeprefix('eval_')} {values[-1]:.3f}")
    for name in ("loss", score):
        for margin in (0, 1, 2):
            ill = called_ill(healthy, name, margin)
            print(f"{name}: {len(ill)} of {len(healthy.seeds)} leave the others' band, widened by {margin} widths")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
