"""The training loop: read, forward, backward, agree, step; from top to bottom in `fit`.

micro-batch    `batch_size` images with their conversations, on one rank
step           `accumulation` micro-batches on every rank, their gradients summed (or averaged), averaged over ranks,
               clipped to norm 1, and one step of AdamW
"""

import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, count
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, send_to_device
from tqdm import tqdm

from self1e import distributed
from self1e.data.mixture import Stream, make_loader
from self1e.errors import UserError
from self1e.flags import DTYPES
from self1e.model.config import LOSS_WEIGHTS
from self1e.training.adapters import optimizer_groups
from self1e.training.args import offloads, read_deepspeed
from self1e.training.curves import log_line
from self1e.training.speed import advice, count_work, peak_flops, peak_memory

BROKEN_SHARE, BROKEN_AFTER = 0.01, 100  # the run stops above this share, counted from this many samples on
CLIP = 1.0
ADVICE_AT = 10  # the step at which memory has been in use as it will be


def make_accelerator(args: Namespace, width: int) -> Accelerator:
    """The accelerator of a run: its precision, DeepSpeed if the flags ask for it, and where its curves go.

    width: of the LLM, by which DeepSpeed's buckets are measured where its JSON leaves them to "auto".
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process had other settings
    gpu = distributed.device().type == "cuda"
    plugin = None
    if args.deepspeed:
        import deepspeed  # absent where nobody asks for it

        # Shared-memory collectives of inference on CPUs: training uses none, yet every rank would compile them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        values = read_deepspeed(args.deepspeed) | {"train_micro_batch_size_per_gpu": args.batch_size}
        buckets = {"reduce_bucket_size": width**2, "stage3_prefetch_bucket_size": width**2 * 9 // 10}
        buckets |= {"stage3_param_persistence_threshold": 10 * width}
        zero = values["zero_optimization"]
        zero |= {name: size for name, size in buckets.items() if zero.get(name) == "auto"}
        values |= {"gradient_accumulation_steps": args.grad_accumulation_steps, "gradient_clipping": CLIP}
        plugin = DeepSpeedPlugin(hf_ds_config=values)
    elif not distributed.launched() and torch.cuda.device_count() > 1:
        raise UserError("several GPUs: start with deepspeed or torchrun, or set CUDA_VISIBLE_DEVICES to one")
    return Accelerator(
        mixed_precision="no" if args.precision == "fp32" else args.precision,
        cpu=not gpu and plugin is None,
        deepspeed_plugin=plugin,
        # Without DeepSpeed `backward` would divide by it; `fit` sums or averages by itself.
        gradient_accumulation_steps=args.grad_accumulation_steps if plugin else 1,
        kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if gpu else "gloo")] if distributed.launched() else [],
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(logging_dir=str(args.run_dir)),
    )


def make_optimizer(model, args: Namespace) -> torch.optim.Optimizer:
    """AdamW over both groups, without weight decay; DeepSpeed's own where its states are offloaded to the CPU."""
    groups = optimizer_groups(model, lr=args.lr, vision_lr=args.vision_lr)
    options: dict[str, Any] = {"lr": args.lr, "betas": (args.beta1, args.beta2), "weight_decay": 0.0}
    if args.deepspeed and offloads(read_deepspeed(args.deepspeed), "offload_optimizer"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        distributed.say("DeepSpeed compiles its CPU Adam, at the first start on a machine")
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, **options, fused=torch.cuda.is_available())


def set_rates(optimizer, args: Namespace, *, step: int, steps: int) -> None:
    """The learning rates after `step` of `steps` steps: linear warm-up to their peaks, then linear decay to 0."""
    warmup, peaks = args.warmup_steps, {"llm": args.lr, "vision_and_head": args.vision_lr}
    share = step / max(1, warmup) if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = peaks[group["name"]] * share


def micro_batches(stream: Stream, args: Namespace, *, step: int, per_epoch: int) -> Iterator[tuple[dict, int, bool]]:
    """This rank's micro-batches from `step` on, each with their number in its step and whether it is the last one."""
    accumulation = args.grad_accumulation_steps
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    for epoch in count(step // per_epoch):
        plan = stream.mixture.micro_batches(args.start_epoch + epoch, **ranks)
        plan = plan[max(0, step - epoch * per_epoch) * accumulation : per_epoch * accumulation]
        loader = make_loader(stream, plan, workers=args.workers, timeout=args.timeout)
        for index, batch in enumerate(loader):
            members = min(accumulation, len(loader) - index // accumulation * accumulation)  # fewer at an epoch's end
            yield batch, members, (index + 1) % accumulation == 0 or index + 1 == len(loader)


@contextmanager
def naming_samples(folder: Path) -> Iterator[Path]:
    """Yields the file for `note`, which this rank's errors quote, and which is there when nobody can speak."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{distributed.rank()}.txt"
    path.write_text("none yet")
    try:
        yield path
    except BaseException as error:
        error.add_note(f"rank {distributed.rank()}, last micro-batch read: {path.read_text(encoding='utf-8').strip()}")
        raise


def note(path: Path, ids: list[str]) -> None:
    """Write the ids of a micro-batch over those of the last one."""
    path.write_text(", ".join(ids) + "\n", encoding="utf-8", errors="backslashreplace")


def agree(
    accelerator: Accelerator, step: list[tuple[list[str], dict]], seen: int, broken: list[str], asked_to_stop: Callable
) -> tuple[bool, int]:
    """The one all-reduce per step, before it is taken: whether any rank was asked to stop, and all broken samples.

    step: ids and loss terms of each of this rank's micro-batches. seen, broken: samples that it read, and ids and
    causes of those that could not be. Raises UserError on all ranks when a loss is not finite or too many are broken.
    """
    infinite = (~torch.stack([terms["loss"].isfinite() for _, terms in step])).sum(0, keepdim=True)
    counts = torch.tensor([seen, len(broken), asked_to_stop()], dtype=torch.float64)
    together = torch.cat([counts.to(accelerator.device, non_blocking=True), infinite])
    all_seen, all_broken, stops, all_infinite = map(int, accelerator.reduce(together, "sum").tolist())
    if all_infinite:
        causes = [
            f"  {', '.join(f'{name} {value.item():.4g}' for name, value in terms.items())} in {', '.join(ids)}"
            for ids, terms in step
            if not terms["loss"].isfinite()
        ]
        lines = chain(*distributed.gather(causes))
        raise UserError("\n".join(["the loss is not finite; the samples of the micro-batch:", *lines]))
    if all_broken > BROKEN_SHARE * max(all_seen, BROKEN_AFTER):
        share = f"{all_broken} broken samples met in reading {all_seen}, more than {BROKEN_SHARE:.0%}"
        raise UserError(f"{share}:\n{broken_list(broken)}")
    return stops > 0, all_broken


def broken_list(broken: list[str]) -> str:
    """A line for each of the 30 broken samples that all ranks drew most often: how often, id, cause."""
    drawn = Counter(chain(*distributed.gather(broken))).most_common(30)
    return "\n".join(f"  {times} x {sample}" for sample, times in drawn)


def figures_of(sums: dict[str, float], peak: float) -> dict[str, float]:
    """The means of the losses, and how fast the run is, from each rank's sums. peak: of a device, per second."""
    ranks = pd.DataFrame(distributed.gather({**sums, "memory": peak_memory()}))
    total = ranks.sum()
    rate = float(total["flops"] / total["seconds"])  # of a device
    return (total.filter(["loss", *LOSS_WEIGHTS]) / total["micro_batches"]).to_dict() | {
        "samples_per_second": float(total["samples"] / ranks["seconds"].mean()),
        "waiting_for_data": float(total["waited"] / total["seconds"]),
        "tflops": rate / 1e12,
        "utilisation": rate / peak,
        "peak_memory_gb": float(ranks["memory"].max()) / 1e9,
    }


def fit(
    accelerator: Accelerator,
    model,
    optimizer,
    batches: Iterator[tuple[dict, int, bool]],
    args: Namespace,
    asked_to_stop: Callable[[], bool],
    *,
    step: int,
    steps: int,
) -> Iterator[tuple[int, dict[str, float], bool]]:
    """Train from `step` to `steps`, or until a rank is asked to stop. For all ranks.

    Yields after each step its number, the figures of its log line, if any, and whether it is the last one on request.

    model, optimizer: what `accelerator.prepare` returned. batches: of `micro_batches`.
    """
    deepspeed, device, stopped = args.deepspeed is not None, accelerator.device, False
    peak = peak_flops(device, args.precision)
    seen = all_broken = 0  # samples that this rank read, and that no rank could read
    broken: list[str] = []  # ids and causes of those that could not be read
    activations = 0  # bytes, the most that `selective` would save in a micro-batch
    work = count_work(accelerator.unwrap_model(model), DTYPES[args.precision])
    sums: Any = Counter()  # of losses, micro-batches, samples, operations and seconds since the last log line
    whole: Any = Counter()  # in all
    bar = tqdm(total=steps, initial=step, unit="step", disable=not distributed.is_main() or not sys.stderr.isatty())
    model.train()
    set_rates(optimizer, args, step=step, steps=steps)
    clock = time.perf_counter()
    with bar, naming_samples(args.run_dir / "ranks") as notes:
        while step < steps and not stopped:
            done, last = [], False
            while not last:
                asked = time.perf_counter()
                batch, members, last = next(batches)
                sums["waited"] += time.perf_counter() - asked
                ids = batch.pop("ids")
                broken += batch.pop("replaced")
                note(notes, ids)
                accelerator.sync_gradients = last  # tells DeepSpeed's `backward` to reduce and to take the step
                with nullcontext() if last or deepspeed else accelerator.no_sync(model):
                    output = model(**send_to_device(batch, device, non_blocking=True))
                    terms = {name: value.detach() for name, value in {"loss": output.loss, **output.losses}.items()}
                    done.append((ids, terms))
                    seen += len(ids)
                    sums.update({name: value.double() for name, value in terms.items()})
                    activations = max(activations, work.pop("saved"))
                    if last:
                        stopped, all_broken = agree(accelerator, done, seen, broken, asked_to_stop)
                    loss = output.loss / (members if args.grad_accumulation_reduction == "mean" else 1)
                    accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
                    sums.update(micro_batches=1, samples=len(ids), flops=work.pop("flops"))
            norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            set_rates(optimizer, args, step=step, steps=steps)
            bar.update()
            figures, due = {}, stopped or step == 1 or step % args.print_freq == 0 or step == steps
            losses = {name: float(sums.pop(name)) for name in terms} if due else {}  # waits for the device
            sums["seconds"] += time.perf_counter() - clock
            if due:
                figures = figures_of({**losses, **sums}, peak) | ({} if norm is None else {"grad_norm": float(norm)})
                figures |= {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
                figures |= {"broken_samples": all_broken}
                whole.update(sums)
                sums.clear()
            if step == ADVICE_AT and device.type == "cuda":
                spare = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
                distributed.say(advice(args.gradient_checkpointing, activations, spare, compiled=args.compile))
            yield step, figures, stopped
            clock = time.perf_counter()  # checkpoints and validations are no time of training
    if whole:
        distributed.say(f"trained for {whole['seconds']:,.0f} s: {log_line(figures_of(whole, peak))}")
    if all_broken:
        distributed.say(f"{all_broken} broken samples replaced:\n{broken_list(broken)}")
