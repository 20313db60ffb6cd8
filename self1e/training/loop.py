"""The training loop: read, forward, backward, agree, step, log, save, validate; from top to bottom in `fit`.

micro-batch    `batch_size` images with their conversations, on one rank
step           `accumulation` micro-batches on every rank, their gradients summed (or averaged), averaged over ranks,
               clipped to norm 1, and one step of AdamW
"""

import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, send_to_device
from tqdm import tqdm

from self1e import distributed
from self1e.data.loader import Encode, make_loader
from self1e.data.mixture import Mixture
from self1e.errors import UserError
from self1e.stop import StopRequest
from self1e.training.adapters import optimizer_groups
from self1e.training.deepspeed_config import fill, offloads, read_deepspeed

BROKEN_SHARE, BROKEN_AFTER = 0.01, 100  # the run stops above this share, counted from this many samples on
CLIP = 1.0


def make_accelerator(args: Namespace) -> Accelerator:
    """The accelerator of a run: its precision, DeepSpeed if the flags ask for it, and where its curves go."""
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process had other settings
    gpu = torch.cuda.is_available()
    plugin = None
    if args.deepspeed:
        import deepspeed  # absent where nobody asks for it

        # Shared-memory collectives of inference on CPUs: training uses none, yet every rank would compile them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        values = fill(read_deepspeed(args.deepspeed), args, ranks=distributed.world_size(), clip=CLIP)
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
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled at its first use

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, **options)


def rate_at(step: int, *, warmup: int, steps: int) -> float:
    """The share of its peak that a learning rate has after `step` steps: linear warm-up, then linear decay to 0."""
    return step / max(1, warmup) if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))


@dataclass
class Meter:
    """What happened since the last log line, on this rank; `line` joins all ranks."""

    sums: dict[str, Any] = field(default_factory=dict)  # loss and its terms, on the device
    micro_batches: int = 0
    samples: int = 0
    waited: float = 0.0  # seconds in which the next micro-batch was not there yet
    since: float = field(default_factory=time.perf_counter)

    def next(self, batches: Iterator[dict]) -> dict:
        """The next micro-batch."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, terms: dict[str, torch.Tensor], samples: int) -> None:
        """Count a micro-batch; nothing waits for the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
        self.micro_batches, self.samples = self.micro_batches + 1, self.samples + samples

    def line(self) -> dict[str, float]:
        """Means over ranks and micro-batches, samples per second, share of time waited, peak memory in bytes."""
        own = {name: float(value) for name, value in self.sums.items()}
        ranks = distributed.gather((own, self.micro_batches, self.samples, self.waited, peak_memory()))
        elapsed = time.perf_counter() - self.since
        count = sum(rank[1] for rank in ranks)
        names = dict.fromkeys(name for rank in ranks for name in rank[0])
        figures = {name: sum(rank[0].get(name, 0.0) for rank in ranks) / count for name in names}
        figures["samples_per_second"] = sum(rank[2] for rank in ranks) / elapsed
        figures["waiting_for_data"] = sum(rank[3] for rank in ranks) / len(ranks) / elapsed
        figures["peak_memory"] = max(rank[4] for rank in ranks)
        return figures


def peak_memory() -> float:
    """The most bytes that this rank's tensors had on its GPU, or without one its process in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class CurrentSamples:
    """The samples of this rank's micro-batch: in a line of a file, for when nobody can speak, and in its own error."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.text = open(folder / f"rank_{distributed.rank()}.txt", "w", encoding="utf-8"), "none yet"

    def __enter__(self) -> "CurrentSamples":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        self.file.close()
        if error is not None:
            error.add_note(f"rank {distributed.rank()}, last micro-batch read: {self.text}")

    def note(self, ids: list[str]) -> None:
        self.text = ", ".join(ids)
        self.file.seek(0)
        self.file.write(self.text + "\n")
        self.file.truncate()
        self.file.flush()


class Agreement:
    """The one exchange of all ranks per step: may it be taken, and is it the last one?"""

    def __init__(self, stop: StopRequest, device: torch.device):
        self.stop, self.device = stop, device
        self.seen = 0  # samples read
        self.broken: list[tuple[str, str]] = []  # (id, cause) of those that could not be

    def stops(self, step: list[tuple[list[str], dict[str, torch.Tensor]]]) -> bool:
        """Whether a rank was asked to stop. step: ids and loss terms of each of this rank's micro-batches.

        Raises UserError on all ranks when a loss is not finite or too many samples are broken.
        """
        infinite = torch.stack([~terms["loss"].isfinite() for _, terms in step]).sum()
        self.seen += sum(len(ids) for ids, _ in step)
        own = [self.seen, len(self.broken), self.stop.signal is not None, 0]
        together = torch.tensor(own, dtype=torch.float64).to(self.device, non_blocking=True)
        together[3] = infinite
        seen, broken, stops, infinite = distributed.total(together).tolist()
        if infinite:
            causes = [
                f"  {', '.join(f'{name} {value.item():.4g}' for name, value in terms.items())} in {', '.join(ids)}"
                for ids, terms in step
                if not terms["loss"].isfinite()
            ]
            lines = "\n".join(line for part in distributed.gather(causes) for line in part)
            raise UserError(f"the loss is not finite; the samples of the micro-batch:\n{lines}")
        if broken > BROKEN_SHARE * max(seen, BROKEN_AFTER):
            share = f"{broken:.0f} broken samples met in reading {seen:.0f}, more than {BROKEN_SHARE:.0%}"
            raise UserError(f"{share}:\n{broken_list(self.all_broken())}")
        return stops > 0

    def all_broken(self) -> list[tuple[str, str]]:
        """(id, cause) of the broken samples of all ranks."""
        return [pair for part in distributed.gather(self.broken) for pair in part]


def broken_list(broken: list[tuple[str, str]], *, lines: int = 30) -> str:
    """One line per broken sample, those drawn most often first: how often, id, cause. At most `lines` of them."""
    counts = Counter(broken).most_common()
    rest = [f"  and {len(counts) - lines:,} more"] if len(counts) > lines else []
    return "\n".join([f"  {times} x {id}: {cause}" for (id, cause), times in counts[:lines]] + rest)


def fit(
    accelerator: Accelerator,
    model,
    optimizer,
    mixture: Mixture,
    encode: Encode,
    args: Namespace,
    *,
    peaks: dict[str, float],
    step: int,
    steps: int,
    per_epoch: int,
    stop: StopRequest,
    log: Callable[[dict[str, float]], None],
    save: Callable[[int], None],
    validate: Callable[[int], bool] | None,
) -> bool:
    """Train from `step` to `steps`; returns whether it got there, or was asked to stop and saved.

    Args:
        model, optimizer: what `accelerator.prepare` returned. encode: turns a sample into what batches are made of.
        peaks: the highest rate of each of the optimizer's groups, in their order. per_epoch: steps of an epoch.
        log: takes the figures of a log line, among them `step`; called on all ranks.
        save, validate: take the step; called on all ranks. `validate` returns whether it was asked to stop.
    """
    deepspeed, device = args.deepspeed is not None, accelerator.device
    agreement, meter, started, stopped = Agreement(stop, device), Meter(), time.perf_counter(), False
    bar = tqdm(total=steps, initial=step, unit="step", disable=not distributed.is_main() or not sys.stderr.isatty())
    model.train()
    with bar, CurrentSamples(args.run_dir / "ranks") as current:
        while step < steps and not stopped:
            epoch, done = divmod(step, per_epoch)
            loader = make_loader(
                mixture,
                encode,
                epoch=args.start_epoch + epoch,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                first=done * args.grad_accumulation_steps,
                stop=per_epoch * args.grad_accumulation_steps,
                workers=args.workers,
                timeout=args.timeout,
                groups=1 if args.zero_stage == 3 else 2,
            )
            batches = iter(loader)
            for start in range(0, len(loader), args.grad_accumulation_steps):
                count = min(args.grad_accumulation_steps, len(loader) - start)  # fewer at the end of an epoch
                micro_batches: list[tuple[list[str], dict[str, torch.Tensor]]] = []
                for group, peak in zip(optimizer.param_groups, peaks.values(), strict=True):
                    group["lr"] = peak * rate_at(step, warmup=args.warmup_steps, steps=steps)
                for last in [False] * (count - 1) + [True]:
                    batch = meter.next(batches)
                    ids = batch.pop("ids")
                    agreement.broken += batch.pop("replaced")
                    current.note(ids)
                    accelerator.sync_gradients = last  # tells DeepSpeed's `backward` to reduce and to take the step
                    quiet: AbstractContextManager = nullcontext() if last or deepspeed else accelerator.no_sync(model)
                    with quiet:
                        output = model(**send_to_device(batch, device, non_blocking=True))
                        terms = {"loss": output.loss, **output.losses}
                        terms = {name: value.detach() for name, value in terms.items()}
                        micro_batches.append((ids, terms))
                        meter.add(terms, len(ids))
                        if last:
                            stopped = agreement.stops(micro_batches)
                        loss = output.loss / (count if args.grad_accumulation_reduction == "mean" else 1)
                        accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
                if step == 1 or step % args.print_freq == 0 or step == steps:
                    figures = {"step": step, **meter.line()}
                    figures |= {"grad_norm": float(norm)} if norm is not None else {}
                    share = rate_at(step, warmup=args.warmup_steps, steps=steps)
                    figures |= {f"lr_{name}": peak * share for name, peak in peaks.items()}
                    log(figures | {"broken_samples": len(agreement.all_broken())})
                    meter = Meter()
                began = time.perf_counter()
                if stopped or step % args.save_steps == 0 or step == steps:
                    save(step)
                if validate and not stopped and (step % args.eval_steps == 0 or step == steps):
                    stopped = validate(step)
                    if stopped:
                        save(step)
                meter.since += time.perf_counter() - began  # is no time of training
                if stopped or step == steps:
                    break
    broken, seconds = agreement.all_broken(), time.perf_counter() - started
    samples = sum(distributed.gather(agreement.seen))
    if step:
        rate = f"{samples / seconds:.1f} samples/s"
        distributed.say(f"trained for {seconds:,.0f} s, checkpoints and validations included, at {rate}")
    if broken:
        distributed.say(f"broken samples replaced: {len(broken)}\n{broken_list(broken)}")
    return not stopped
