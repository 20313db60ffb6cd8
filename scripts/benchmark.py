"""Time, memory and FLOPs of evaluation, training and generation, beside a baseline made of the model's own switches.

Command:  python scripts/benchmark.py [--version PATH/InternVL3-2B --device cuda --dtype bf16] [--output FOLDER]
Cost:     about a minute on 2 CPU cores with the default tiny model.
Output:   a table, and FOLDER/benchmark.json with every figure.
Expected: ratios of FLOPs and memory above 1; of the tiny model 3.7 and 2.9 at 7 sentences, 4.9 and 4.6 at 30. Figures
          at the 2B's widths are in docs/log.md.

The baseline gives each row its own image, attends eagerly and computes vocabulary logits of every token. `of peak` is
the FLOPs per second as a share of what a large matrix product reaches here.
"""

import argparse
import json
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.model.configuration import DTYPES
from self1e.synthetic.tiny_internvl import make_tiny_internvl

QUESTION = "<image>\n What is thing {} in this image? Please output segmentation mask."


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are alive together, on any device, those of `known` not counted."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self.alive = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.alive:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


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


def matmul_peak(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOPs per second of a square matrix product."""
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ a, 3)


def measure(model: torch.nn.Module, work: Callable[[], object], repeats: int, peak: float) -> dict[str, float]:
    """Time, FLOPs, memory beyond the weights, and utilisation of `work`."""
    with FlopCounterMode(display=False) as counter, Peak(model.parameters()) as memory:
        work()
    model.zero_grad()
    took, flops = seconds(work, repeats), counter.get_total_flops()
    return {"seconds": took, "tflop": flops / 1e12, "memory_gb": memory.most / 1e9, "of_peak": flops / took / peak}


def batches(processor, rows: int, *, shared: bool, labels: bool, device: str) -> dict:
    """Rows about one photo, encoded once or again for each; with `labels`, masks to train on."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    texts = [[QUESTION.format(i), "[SEG]."] for i in range(rows)]
    conversations = [texts] if shared else [[text] for text in texts]
    masks = [[np.ones((1, 480, 640), np.uint8)] * len(group) for group in conversations] if labels else None
    batch = processor([photo] * len(conversations), conversations, masks)
    if not labels:
        del batch["labels"]
    return dict(batch.to(device))


def run(args: argparse.Namespace, version: str) -> dict[str, dict]:
    """Every case, ours and the baseline."""
    peak = matmul_peak(args.device, DTYPES[args.dtype], args.matmul)
    processor, found = Self1EProcessor.from_pretrained(version), {}
    start = time.perf_counter()
    ours = Self1EForSegmentation.from_pretrained(version, dtype=DTYPES[args.dtype]).to(args.device)
    loading = time.perf_counter() - start
    eager = Self1EForSegmentation.from_pretrained(version, dtype=DTYPES[args.dtype], attn_implementation="eager")
    models = {"ours": ours, "baseline": eager.to(args.device)}
    for rows in args.sentences:
        pair = {}
        for name, model in models.items():
            batch = batches(processor, rows, shared=name == "ours", labels=False, device=args.device)
            keep = 0 if name == "ours" else batch["input_ids"].shape[1]
            with torch.no_grad():
                work = lambda model=model, batch=batch, keep=keep: model(**batch, logits_to_keep=keep)  # noqa: E731
                pair[name] = measure(model.eval(), work, args.repeats, peak)
        found[f"evaluation, {rows} sentences"] = pair
    pair = {}
    for name, model in models.items():
        batch = batches(processor, 3, shared=name == "ours", labels=True, device=args.device)
        if name == "baseline":
            batch["labels"] = batch["input_ids"]
        work = lambda model=model, batch=batch: model(**batch).loss.backward()  # noqa: E731
        pair[name] = measure(model.train(), work, args.repeats, peak)
        model.zero_grad()
    found["training, 3 rows"] = pair
    batch = batches(processor, 1, shared=True, labels=False, device=args.device)
    for name, model in models.items():
        work = lambda model=model: model.generate(**batch, max_new_tokens=8, do_sample=False)  # noqa: E731
        found.setdefault("generation, 8 tokens", {})[name] = measure(model.eval(), work, args.repeats, peak)
    return {"loading": {"seconds": loading}, "matmul": {"tflop_per_second": peak / 1e12}, "cases": found}


def table(cases: dict[str, dict]) -> str:
    """Ours, and the baseline's figures as multiples of ours."""
    lines = [f"{'':<28}{'s':>9}{'TFLOP':>9}{'GB':>8}{'of peak':>9}   baseline: x s{'x FLOP':>9}{'x GB':>7}"]
    for name, pair in cases.items():
        ours, other = pair["ours"], pair["baseline"]
        ratios = [other[key] / ours[key] for key in ("seconds", "tflop", "memory_gb")]
        figures = f"{ours['seconds']:>9.3f}{ours['tflop']:>9.4f}{ours['memory_gb']:>8.3f}{ours['of_peak']:>9.1%}"
        lines.append(f"{name:<28}{figures}   {ratios[0]:>13.2f}{ratios[1]:>9.2f}{ratios[2]:>7.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="a checkpoint; unset: a tiny random model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the weights")
    parser.add_argument("--sentences", type=int, nargs="+", default=[1, 7, 30], help="sentences about one photo")
    parser.add_argument("--matmul", type=int, default=1024, help="side of the matrices that measure the peak")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder of benchmark.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = {"image_size": 224, "vocab_size": 8000}
        version = args.version or str(make_tiny_internvl(Path(folder) / "tiny", **tiny))
        result = run(args, version)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"loading {result['loading']['seconds']:.1f} s, matmul {result['matmul']['tflop_per_second']:.3f} TFLOP/s")
    print(table(result["cases"]))


if __name__ == "__main__":
    main()
