"""What training, evaluation and chat cost: counted at full depth without a GPU, or measured on the one that is there.

Command: python scripts/benchmark.py --meta           # operations and memory of 1B, 2B and 8B, without values
         python scripts/benchmark.py --gpu            # 2B with random weights on this machine's CUDA GPU
         python scripts/benchmark.py --gpu --tiny     # a tiny model, on a CPU too: to see that the program runs
Cost:    a minute on one CPU core; about 8 minutes on a GPU.
Result:  tables on the terminal and --output/benchmark.json. docs/training.md holds the table of --meta.

--gpu measures agreement with the recorded outputs of the published program in fp32 and bf16, host waits, time,
samples per second, utilisation and memory of a recipe micro-batch for each kind of checkpointing and with --compile,
the first against the second visit of a shape, evaluation of 1, 7 and 30 sentences, chat, and the slowest kernels.
Weights are random: masks and texts mean nothing. Utilisation leaves recomputation out, and is of the measured peak.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import accelerate  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from self1e import Self1EForSegmentation, Self1EProcessor, distributed  # noqa: E402
from self1e.apps.costs import CHECKPOINTING, SIZES, configuration, evaluation_cost, training_cost  # noqa: E402
from self1e.model.inference import masks_of  # noqa: E402
from self1e.synthetic.tiny_internvl import make_tiny_internvl  # noqa: E402
from self1e.training.adapters import adapt  # noqa: E402
from self1e.training.speed import compile_layers  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = distributed.device("cuda" if CUDA else "cpu")  # with the settings of every command
PHOTO = (480, 640)  # pixels, as most of COCO
QUESTION = "<image>\n What is thing {} in this image? Please output segmentation mask."
Figures = dict[str, Any]


def show(title: str, figures: Figures) -> Figures:
    values = (f"{key} {x:.4g}" if isinstance(x, (int, float)) else f"{key} {x}" for key, x in figures.items())
    print(f"  {title:<44} {'  '.join(values)}", flush=True)
    return figures


def count_costs() -> Figures:
    """FLOPs and memory at full depth, per size: a recipe micro-batch per kind of checkpointing, and evaluation."""
    work = {
        f"{size}, training, {kind}" + (", 4 tiles" if tiles > 1 else ""): partial(
            training_cost, size, kind, tiles=tiles
        )
        for size in SIZES
        for tiles in (1, 4)
        for kind in CHECKPOINTING
    } | {
        f"{size}, evaluation, {n} sentences": partial(evaluation_cost, size, sentences=n)
        for size in SIZES
        for n in (1, 7, 30)
    }
    costs = ((name, count()) for name, count in work.items())
    return {name: show(name, {"tflop": c.flops / 1e12, "activations_gb": c.activations / 1e9}) for name, c in costs}


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure(work: Callable[[], object], repeats: int) -> Figures:
    """Median seconds after a warm-up; `host`: until all of it is enqueued; peak memory, weights included."""
    work()
    synchronize()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    hosts, totals = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        hosts.append(time.perf_counter() - start)
        synchronize()
        totals.append(time.perf_counter() - start)
    figures = {"seconds": statistics.median(totals), "host": statistics.median(hosts)}
    return figures | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if CUDA else {})


def flops_of(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def waits_of(work: Callable[[], object]) -> Counter:
    """Line of Python -> operations in which the host waits for the GPU; nothing is counted without one."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        work()
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(x.filename).name}:{x.lineno}" for x in heard if "synchroniz" in str(x.message))


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*PHOTO, 3), dtype=np.uint8))


def parity() -> Figures:
    """Largest differences from the mask logits and losses that tests/golden records."""
    found: Figures = {}
    for precision in torch.float32, torch.bfloat16:
        for pack in sorted((ROOT / "tests/golden").glob("qwen*")):
            base = pack / "base_internvl_chat"
            processor = Self1EProcessor.from_pretrained(base)
            model = Self1EForSegmentation.from_pretrained(base, weights=str(pack / "trained_self1e"), dtype=precision)
            model.to(DEVICE)
            for case in json.loads((pack / "cases.json").read_text())["cases"]:
                golden = dict(np.load(pack / f"{case['name']}.npz"))
                groups = [(name, list(rows)) for name, rows in groupby(case["rows"], key=lambda row: row["photo"])]
                images = [Image.open(pack / "photos" / name) for name, _ in groups]
                batch = processor(images, [[row["conversation"] for row in rows] for _, rows in groups]).to(DEVICE)
                with torch.no_grad():
                    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).mask_logits
                pairs = [(x.float().cpu().numpy(), golden[f"mask_logits_{i}"]) for i, x in enumerate(logits) if len(x)]
                figures = {"logits": max(float(np.abs(a - b).max()) for a, b in pairs)}
                figures["other_sign"] = float(np.mean([((a > 0) != (b > 0)).mean() for a, b in pairs]))
                name = f"{str(precision).removeprefix('torch.')}, {pack.name}, {case['name']}"
                found[name] = show(name, figures)
    return found


class Recipe:
    """A model with random weights, and micro-batches as the recipe makes them, with ids of a small tokenizer."""

    def __init__(self, tiny: bool):
        self.folder = tempfile.TemporaryDirectory()
        sizes = {"image_size": 56, "vocab_size": 400} if tiny else {"vocab_size": 8000, "image_size": 448}
        base = make_tiny_internvl(self.folder.name, **sizes)
        self.tiny, self.processor, self.repeats = tiny, Self1EProcessor.from_pretrained(base), 1 if tiny else 5
        self.config = Self1EForSegmentation.from_pretrained(base).config if tiny else configuration("2B")
        for token in "image_token_id", "seg_token_id":
            setattr(self.config, token, getattr(self.processor, token))
        side = 512 if tiny else 8192
        a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
        self.peak = 2 * side**3 / measure(lambda: a @ a, repeats=5)["seconds"]

    def model(self, *, training: bool) -> torch.nn.Module:
        with torch.device(DEVICE):
            model = Self1EForSegmentation._from_config(self.config, dtype=torch.bfloat16, attn_implementation="sdpa")
            if training:
                rank = 8 if self.tiny else 128
                adapt(model, use_llm_lora=True, use_vision_lora=True, optimize_vision=True, lora_r=rank)
        model.trained_head = True
        return model.to(torch.bfloat16).train(training)

    def micro_batch(self, longer: int = 0) -> dict:
        """5 images x 3 conversations, of which four images have masks; on the device."""
        encoded = []
        for number in range(5):
            answer, count = ("It is [SEG].", 1) if number < 4 else ("so " * 60, 0)
            texts = [[QUESTION.format(i) + " yes" * (longer + i), answer] for i in range(3)]
            masks = [torch.ones(count, *PHOTO, dtype=torch.uint8)] * 3
            encoded.append(self.processor.encode(photo(number), texts, masks))
        batch = self.processor.collate(encoded, groups=2)
        moved = {name: value.to(DEVICE) for name, value in batch.items() if hasattr(value, "to")}
        return {**batch, **moved, "mask_targets": [mask.to(DEVICE) for mask in batch["mask_targets"]]}


def train_step(model: torch.nn.Module, batch: dict) -> None:
    model(**batch).loss.backward()
    model.zero_grad()


def train(recipe: Recipe) -> Figures:
    """A micro-batch per kind of checkpointing, then compiled layers without it; host waits and utilisation."""
    found: Figures = {}
    model, batch = recipe.model(training=True), recipe.micro_batch()
    step = partial(train_step, model, batch)
    flops = flops_of(step)  # without checkpointing, so that recomputation counts for nothing
    for kind, options in CHECKPOINTING.items():
        if options:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        figures = measure(step, recipe.repeats)
        figures |= {
            "samples_per_second": 5 / figures["seconds"],
            "utilisation": flops / figures["seconds"] / recipe.peak,
        }
        found[kind] = show(f"training, {kind}", figures | {"waits": sum(waits_of(step).values())})
        model.gradient_checkpointing_disable()
    if CUDA:
        compile_layers(model)
        figures = measure(step, recipe.repeats)
        found["compiled"] = show("training, compiled layers", figures | {"samples_per_second": 5 / figures["seconds"]})
    return found | {"tflop": flops / 1e12, "waits": dict(waits_of(step))}


def shapes(recipe: Recipe) -> Figures:
    """Lengths that were not met before against the same ones again, with and without cuDNN's attention."""
    found, model = {}, recipe.model(training=True)
    for cudnn in True, False:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        train_step(model, recipe.micro_batch(100))
        seconds = []
        for longer in [*range(2, 2 + 2 * recipe.repeats, 2)] * 2:
            batch = recipe.micro_batch(longer + 50 * cudnn)
            synchronize()
            start = time.perf_counter()
            train_step(model, batch)
            synchronize()
            seconds.append(time.perf_counter() - start)
        first, again = seconds[: recipe.repeats], seconds[recipe.repeats :]
        name = "cuDNN allowed" if cudnn else "without cuDNN"
        found[name] = show(f"new lengths, {name}", {"first": statistics.mean(first), "again": statistics.mean(again)})
    return found


def kernels(recipe: Recipe) -> Figures:
    """The operations that take most of a training step."""
    step = partial(train_step, recipe.model(training=True), recipe.micro_batch())
    step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA) as seen:
        step()
        synchronize()
    field = "self_device_time_total" if CUDA else "self_cpu_time_total"
    ranked = sorted(seen.key_averages(), key=lambda x: -getattr(x, field))[:15]
    return {x.key[:100]: show(x.key[:44], {"ms": getattr(x, field) / 1e3, "calls": x.count}) for x in ranked}


def evaluation(recipe: Recipe) -> Figures:
    found, model = {}, recipe.model(training=False)
    for sentences in 1, 7, 30:
        batch = dict(recipe.processor([photo()], [[[QUESTION.format(i), "[SEG]."] for i in range(sentences)]]))
        work = partial(masks_of, model, batch, [PHOTO])
        figures, flops = measure(work, recipe.repeats), flops_of(work)
        figures |= {"utilisation": flops / figures["seconds"] / recipe.peak, "waits": sum(waits_of(work).values())}
        found[f"{sentences} sentences"] = show(f"evaluation, {sentences} sentences", figures)
    return found


def chat(recipe: Recipe) -> Figures:
    found, model, tokens = {}, recipe.model(training=False), 8 if recipe.tiny else 64
    for count in 1, 8:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        figures = measure(partial(model.chat, recipe.processor, photo(), ["What is it?"] * count, **options), 2)
        figures |= {"tokens_per_second": tokens * count / figures["seconds"]}
        found[f"{count} conversations"] = show(f"chat, {count} conversations, {tokens} tokens each", figures)
    return found


def measure_gpu(tiny: bool, write: Callable[[Figures], None]) -> Figures:
    recipe = Recipe(tiny)
    result: Figures = {"tiny": tiny, "matmul_tflops": recipe.peak / 1e12}
    for part in parity, train, shapes, kernels, evaluation, chat:
        print(part.__name__)
        result[part.__name__] = part() if part is parity else part(recipe)
        write(result)
        gc.collect()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta", action="store_true", help="count operations and memory")
    parser.add_argument("--gpu", action="store_true", help="measure on this machine")
    parser.add_argument("--tiny", action="store_true", help="with --gpu: a tiny model, also without a GPU")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder of benchmark.json")
    args = parser.parse_args()
    if args.meta == args.gpu:
        parser.error("give --meta or --gpu")
    if args.gpu and not (CUDA or args.tiny):
        parser.error("--gpu: torch finds no CUDA GPU here; --meta counts without one")
    versions = {x.__name__: x.__version__ for x in (torch, transformers, accelerate, peft)}
    environment = versions | {"device": torch.cuda.get_device_name() if CUDA else "cpu"}
    args.output.mkdir(parents=True, exist_ok=True)

    def write(result: Figures) -> None:
        (args.output / "benchmark.json").write_text(json.dumps({"environment": environment} | result, indent=1))

    print("  ".join(f"{name} {value}" for name, value in environment.items()))
    write(count_costs() if args.meta else measure_gpu(args.tiny, write))
    print(f"written: {args.output / 'benchmark.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
