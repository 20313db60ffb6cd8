"""What the design's shortcuts save, as ratios measured in one run on this machine (paper's sizes need a GPU).

Command:  python scripts/benchmark.py [--version PATH/InternVL3-2B] [--device cuda] [--sentences 16] [--repeats 5]
Cost:     under a minute on 2 CPU cores with the default tiny model.
Expected: every ratio above 1. Tiny model, one CPU thread: 2.2 (encoding once), 4.3 (one batch), 1.06 and 1.06 (logits;
          with a real vocabulary of 151,676 these weigh more).
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_tiny_internvl import make_tiny_internvl  # noqa: E402

from self1e import Self1EForSegmentation, Self1EProcessor  # noqa: E402


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of `work`, after one unmeasured run."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="a checkpoint; unset: a tiny random model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sentences", type=int, default=16, help="about one photo")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        version = args.version or str(make_tiny_internvl(Path(folder) / "tiny", image_size=224, vocab_size=8000))
        processor = Self1EProcessor.from_pretrained(version)
        model = Self1EForSegmentation.from_pretrained(version, dtype=torch.float32).to(args.device)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    question = "<image>\n What is thing {} in this image? Please output segmentation mask."
    rows = [[question.format(i), "[SEG]."] for i in range(args.sentences)]

    def batch(images: int, rows_each: int):
        made = processor([photo] * images, [rows[i * rows_each : (i + 1) * rows_each] for i in range(images)])
        return {name: value.to(args.device) for name, value in made.items()}

    shared, repeated = batch(1, args.sentences), batch(args.sentences, 1)
    unlabelled = {name: value for name, value in shared.items() if name != "labels"}
    alone = [{k: v for k, v in batch(1, 1).items() if k != "labels"} for _ in range(args.sentences)]
    every = {**shared, "labels": shared["input_ids"]}
    with torch.no_grad():
        pairs = {
            "a photo encoded once / again for every sentence": (lambda: model(**shared), lambda: model(**repeated)),
            "sentences of a photo in one batch / one by one": (
                lambda: model(**unlabelled),
                lambda: [model(**one) for one in alone],
            ),
            "vocabulary logits at labels only / at every token": (lambda: model(**shared), lambda: model(**every)),
            "no vocabulary logits in evaluation / at labels": (lambda: model(**unlabelled), lambda: model(**shared)),
        }
        print(f"{'':<52}{'ours, s':>10}{'other, s':>10}{'ratio':>8}")
        for name, (ours, other) in pairs.items():
            a, b = seconds(ours, args.repeats), seconds(other, args.repeats)
            print(f"{name:<52}{a:>10.3f}{b:>10.3f}{b / a:>8.2f}")


if __name__ == "__main__":
    main()
