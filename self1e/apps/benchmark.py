"""What evaluation, training, generation, loading and data cost on this machine; see scripts/benchmark.py."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.measuring import Peak, seconds
from self1e.data.families import FAMILIES, DataConfig, SetChoice
from self1e.data.loader import Encode
from self1e.data.paths import missing
from self1e.data.samples import SampleError
from self1e.files import replacing, write_json
from self1e.model import photos
from self1e.model.config import DTYPES
from self1e.synthetic.shapes_dataset import make_shapes_dataset
from self1e.synthetic.tiny_internvl import make_tiny_internvl

QUESTION = "<image>\n What is thing {} in this image? Please output segmentation mask."
EVALUATION = "evaluation, {} sentences"
STAGES = ("annotations", "photo", "processor")
TILE = {"image_size": 448, "tile_tokens": 256}  # of the InternVL3 releases, whatever model is measured


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


def train_step(model: torch.nn.Module, batch: dict) -> None:
    model(**batch).loss.backward()
    model.zero_grad()


def run(args: Namespace) -> dict[str, dict]:
    """Every figure, of ours and of the baseline."""
    peak = matmul_peak(args.device, DTYPES[args.dtype], args.matmul)
    processor, found = Self1EProcessor.from_pretrained(args.version), {}
    start = time.perf_counter()
    ours = Self1EForSegmentation.from_pretrained(args.version, dtype=DTYPES[args.dtype]).to(args.device)
    loading = time.perf_counter() - start
    eager = Self1EForSegmentation.from_pretrained(args.version, dtype=DTYPES[args.dtype], attn_implementation="eager")
    models = {"ours": ours, "baseline": eager.to(args.device)}
    for rows in tqdm(args.sentences, desc="evaluation", mininterval=1):
        pair = {}
        for name, model in models.items():
            batch = batches(processor, rows, shared=name == "ours", labels=False, device=args.device)
            keep = 0 if name == "ours" else batch["input_ids"].shape[1]
            with torch.no_grad():
                pair[name] = measure(model.eval(), partial(model, **batch, logits_to_keep=keep), args.repeats, peak)
        found[EVALUATION.format(rows)] = pair
    pair = {}
    for name, model in models.items():
        batch = batches(processor, 3, shared=name == "ours", labels=True, device=args.device)
        if name == "baseline":
            batch["labels"] = batch["input_ids"]
        pair[name] = measure(model.train(), partial(train_step, model, batch), args.repeats, peak)
    found["training, 3 rows"] = pair
    batch = batches(processor, 1, shared=True, labels=False, device=args.device)
    generation = found["generation, 8 tokens"] = {}
    for name, model in models.items():
        work = partial(model.generate, **batch, max_new_tokens=8, do_sample=False)
        generation[name] = measure(model.eval(), work, args.repeats, peak)
    return {
        "loading": {"seconds": loading},
        "matmul": {"tflop_per_second": peak / 1e12},
        "cases": found,
        "data": on_one_core(partial(data_rates, processor, args)),
    }


def on_one_core(work: Callable[[], dict]) -> dict:
    """The result of `work`, with one thread as in a data worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


def training_sets(dataset_dir: Path, data_dir: Path) -> Iterator[tuple[str, SetChoice]]:
    """Every set of the trees that is there."""
    for name, family in FAMILIES.items():
        for set_name in family.sets:
            (choice,) = family.choose(f"--{name}_data", set_name, **family.options)
            if not missing([(set_name, path) for path in choice.paths(dataset_dir, data_dir)]):
                yield set_name, choice


def data_rates(processor: Self1EProcessor, args: Namespace) -> dict[str, dict[str, float]]:
    """What a data worker does for `--samples` samples of each set: samples per second, and seconds per sample of each
    stage: annotations with masks and texts, decoding of the photo, the processor. The disk is not measured.
    """
    encode = Encode(Self1EProcessor(processor.tokenizer, **TILE), max_length=512, max_tiles=1)
    found, spent, decode = {}, dict.fromkeys(STAGES, 0.0), photos.as_rgb

    def timed(stored: Image.Image) -> Image.Image:
        start = time.perf_counter()
        image = decode(stored)
        spent["photo"] += time.perf_counter() - start
        return image

    for name, choice in tqdm(list(training_sets(args.dataset_dir, args.data_dir)), desc="data", mininterval=1):
        data = choice.open(DataConfig(Path(args.dataset_dir), Path(args.data_dir)))
        items = np.linspace(0, len(data) - 1, min(args.samples, len(data))).astype(int).tolist()
        for _ in range(2):  # the first time brings the files into memory
            spent, whole = dict.fromkeys(STAGES, 0.0), 0
            for item in items:
                start, decoding = time.perf_counter(), spent["photo"]
                with suppress(SampleError), patch.object(photos, "as_rgb", timed):
                    sample = data.read(item, np.random.default_rng(item))
                    if sample is None:
                        continue
                    read = time.perf_counter()
                    encode(sample)
                    spent["processor"] += time.perf_counter() - read
                    spent["annotations"] += read - start - (spent["photo"] - decoding)
                    whole += 1
        if whole:  # else all of them are broken, which `self1e check-data` explains
            rate = whole / sum(spent.values())
            found[name] = {"samples_per_second": rate, **{stage: spent[stage] / whole for stage in STAGES}}
    return found


def draw(cases: dict[str, dict], sentences: list[int], path: Path) -> None:
    """Time, FLOPs and memory of an evaluated photo over its number of sentences, ours and the baseline, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = {"seconds": "seconds per photo", "tflop": "TFLOP per photo", "memory_gb": "GB beside the weights"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items()):
        for name in ("ours", "baseline"):
            axes.plot(sentences, [cases[EVALUATION.format(n)][name][key] for n in sentences], marker="o", label=name)
        axes.set(title=title, xlabel="sentences about one photo", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def table(result: dict[str, dict]) -> str:
    """Ours with the baseline's figures as multiples of ours, and the rates of the data."""
    loading, speed = result["loading"]["seconds"], result["matmul"]["tflop_per_second"]
    lines = [
        f"loading {loading:.1f} s, matmul {speed:.3f} TFLOP/s",
        f"{'':<28}{'s':>9}{'TFLOP':>9}{'GB':>8}{'of peak':>9}   baseline: x s{'x FLOP':>9}{'x GB':>7}",
    ]
    for name, pair in result["cases"].items():
        ours, other = pair["ours"], pair["baseline"]
        ratios = [other[key] / ours[key] for key in ("seconds", "tflop", "memory_gb")]
        figures = f"{ours['seconds']:>9.3f}{ours['tflop']:>9.4f}{ours['memory_gb']:>8.3f}{ours['of_peak']:>9.1%}"
        lines.append(f"{name:<28}{figures}   {ratios[0]:>13.2f}{ratios[1]:>9.2f}{ratios[2]:>7.2f}")
    lines.append(f"\n{'data, one core':<28}{'samples/s':>11}" + "".join(f"{f'{stage}, ms':>17}" for stage in STAGES))
    for name, rates in result["data"].items():
        parts = "".join(f"{rates[stage] * 1000:>17.1f}" for stage in STAGES)
        lines.append(f"{name:<28}{rates['samples_per_second']:>11.1f}{parts}")
    return "\n".join(lines)


def benchmark(args: Namespace) -> str:
    """Measure, write `benchmark.json` and `benchmark.png` to `--output`, and return the table."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        if args.version is None:
            args.version = str(make_tiny_internvl(Path(folder) / "tiny", image_size=224, vocab_size=8000))
        if args.dataset_dir is None:
            scenes = make_shapes_dataset(Path(folder) / "shapes", train=args.samples + 1, val=2, size=640)
            args.dataset_dir, args.data_dir = scenes / "dataset", scenes / "data"
        result = run(args)
    write_json(args.output / "benchmark.json", result, indent=2)
    draw(result["cases"], sorted(args.sentences), args.output / "benchmark.png")
    return table(result)
