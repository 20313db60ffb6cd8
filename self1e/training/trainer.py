"""transformers' Trainer with our stream, two learning rates, losses by term, and checkpoints whole or absent."""

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import ProgressCallback, Trainer

from self1e.data.mixture import AllBroken, Mixture
from self1e.data.sample import Sample, SampleError
from self1e.training.adaptation import optimizer_groups

BROKEN_SHARE, BROKEN_AFTER = 0.01, 100  # the run stops above this share, counted from this many samples on


class TooManyBroken(RuntimeError):
    """More samples than tolerated could not be read."""


class NotSaved(OSError):
    """A checkpoint could not be written."""


class Encode:
    """Sample -> what `Self1EProcessor.collate` takes, in a data worker; what does not fit counts as broken."""

    def __init__(self, processor, *, max_length: int, max_tiles: int):
        self.processor, self.options = processor, {"max_length": max_length, "max_tiles": max_tiles}

    def __call__(self, sample: Sample) -> dict:
        try:
            encoded = self.processor.encode(sample.image, sample.conversations, sample.masks, **self.options)
        except ValueError as error:
            raise SampleError(sample.id, str(error)) from error
        return encoded | {"id": sample.id, "replaced": sample.replaced}


class Collate:
    """Encoded samples -> batch, with the samples' ids and the broken ones that they replace."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, encoded: list[dict | TooManyBroken]) -> dict:
        failed = [e for e in encoded if isinstance(e, TooManyBroken)]
        if failed:
            return {"failed": failed[0]}
        replaced = [pair for e in encoded for pair in e["replaced"]]
        return dict(self.processor.collate(encoded)) | {"ids": [e["id"] for e in encoded], "replaced": replaced}


class Stream(Dataset):
    """`Mixture` as the map from places to samples that a DataLoader reads."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def __len__(self) -> int:
        return self.mixture.epoch_size

    def __getitem__(self, place: int) -> dict | TooManyBroken:
        try:
            return self.mixture[place]
        except AllBroken as error:  # raised by the main process: from a worker it would come inside a traceback
            return TooManyBroken(str(error))


class MicroBatches:
    """This rank's micro-batches of an epoch, as the DataLoader's batch sampler.

    Args:
        limit: micro-batches an epoch, at most (`--steps_per_epoch`).
        first_epoch: epoch of the mixture that stands for the Trainer's epoch 0 (`--start_epoch`).
    """

    def __init__(
        self, mixture: Mixture, *, rank: int, world_size: int, limit: int | None = None, first_epoch: int = 0
    ):
        self.mixture, self.rank, self.world_size = mixture, rank, world_size
        self.limit, self.first_epoch, self.epoch = limit, first_epoch, 0
        self.length = len(mixture.micro_batches(first_epoch, rank=rank, world_size=world_size)[:limit])
        self.batch_size, self.drop_last = mixture.batch_size, False  # read by accelerate when it skips batches

    @property
    def batch_sampler(self) -> "MicroBatches":
        """The Trainer looks for `set_epoch` behind this name, where accelerate's wrappers keep the inner sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.mixture.micro_batches(self.first_epoch + self.epoch, rank=self.rank, world_size=self.world_size)
        yield from (places.tolist() for places in plan[: self.limit])


class Progress(ProgressCallback):
    """The library's progress bar, with log lines that fit a terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(state.global_step, logs))


def log_line(step: int, logs: dict[str, float]) -> str:
    """One line for the terminal; TensorBoard holds every digit."""
    if "loss" in logs:
        terms = ", ".join(f"{name.removeprefix('mask_')} {logs[name]:.4f}" for name in ("ce", "mask_bce", "mask_dice"))
        rates = ", ".join(f"{key[3:]} {rate:.2e}" for key, rate in logs.items() if key.startswith("lr_"))
        figures = [f"loss {logs['loss']:.4f} ({terms})"]
        figures += [f"grad norm {logs['grad_norm']:.3f}"] if "grad_norm" in logs else []  # absent after fp16 overflow
        figures += [f"lr {rates}", f"{logs['samples_per_second']:.1f} samples/s"]
        figures += [f"{logs['broken_samples']} broken samples"] if logs["broken_samples"] else []
    else:
        figures = [f"{name} {value:.4g}" for name, value in logs.items() if name not in ("epoch", "total_flos")]
    return f"step {step}  epoch {logs['epoch']:.3f}  " + "  ".join(figures)


class Self1ETrainer(Trainer):
    """Args beyond the Trainer's: the stream's limits, both learning rates, and what validates.

    Args:
        lr, vision_lr: see `adaptation.optimizer_groups`.
        reduction: "sum" or "mean" of the accumulated micro-batches' gradients, before clipping.
        epoch_limit: micro-batches an epoch, at most. first_epoch: see `MicroBatches`.
        validate: step -> figures to log, called every `eval_steps` on every rank.
    """

    def __init__(
        self,
        *,
        mixture: Mixture,
        processor,
        lr: float,
        vision_lr: float,
        reduction: str,
        epoch_limit: int | None,
        first_epoch: int,
        validate: Callable[[int], dict[str, float]],
        **kwargs,
    ):
        self.lr, self.vision_lr, self.validate = lr, vision_lr, validate
        self.epoch_limit, self.first_epoch = epoch_limit, first_epoch
        self.loss_is_scaled_for_ga = reduction == "sum"
        self.partial: Path | None = None
        self.sums, self.seen, self.broken = Counter(), 0, []
        self.logged_at = time.perf_counter()
        super().__init__(train_dataset=Stream(mixture), data_collator=Collate(processor), **kwargs)
        self.model_accepts_loss_kwargs = False
        self.pop_callback(ProgressCallback)
        self.add_callback(Progress)

    def get_train_dataloader(self) -> DataLoader:
        """Every rank reads its own micro-batches; no sampler of accelerate's stands between."""
        sampler = MicroBatches(
            self.train_dataset.mixture,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            limit=self.epoch_limit,
            first_epoch=self.first_epoch,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # workers' seeds come from here and not from the training's own stream
        )

    def _run_epoch(self, **kwargs) -> None:
        """Nothing when a finished run is continued, where the library would take one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:
            self.control.should_training_stop = True

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW over both groups, without weight decay."""
        if self.optimizer is None:
            groups = optimizer_groups(self.model, lr=self.lr, vision_lr=self.vision_lr)
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=betas, weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The model's loss; counts its terms and the broken samples. Raises FloatingPointError, TooManyBroken."""
        if "failed" in inputs:
            raise inputs["failed"]
        ids, replaced = inputs.pop("ids"), inputs.pop("replaced")
        output = model(**inputs)
        names, values = ("loss", *output.losses), [output.loss, *output.losses.values()]
        values = dict(zip(names, torch.stack([value.detach().float() for value in values]).tolist()))
        self.seen += len(ids)
        self.broken += replaced
        self.check(ids, values)
        self.sums.update(values | {"micro_batches": 1, "samples": len(ids)})
        return output.loss

    def check(self, ids: list[str], losses: dict[str, float]) -> None:
        """Stop all ranks together when one met a loss that is not finite, or all together too many broken samples.

        Rank 0 raises, with what the others have to say; those leave quietly.
        """
        infinite = not math.isfinite(losses["loss"])
        counts = torch.tensor([self.seen, len(self.broken), infinite], device=self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        seen, broken, infinite_ranks = counts.tolist()
        if infinite_ranks:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            causes = self.gather([f"  {terms} in {', '.join(ids)}"] if infinite else [])
            error = FloatingPointError("the loss is not finite; the micro-batch's samples:\n" + "\n".join(causes))
        elif broken > BROKEN_SHARE * max(seen, BROKEN_AFTER):
            share = f"{broken} broken samples met in reading {seen}, more than {BROKEN_SHARE:.0%}"
            error = TooManyBroken(f"{share}:\n{broken_list(self.gather(self.broken))}")
        else:
            return
        raise error if self.args.process_index == 0 else SystemExit(1)

    def gather(self, items: list) -> list:
        """The items of all ranks, on every rank."""
        parts = [items]
        if self.args.world_size > 1:
            parts = [None] * self.args.world_size
            dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term's mean over ranks and micro-batches since the last line, both learning rates, samples/s."""
        if "loss" in logs and self.sums["micro_batches"]:
            names = ("loss", "ce", "mask_bce", "mask_dice", "micro_batches", "samples", "broken")
            self.sums["broken"] = len(self.broken)
            sums = torch.tensor([self.sums[name] for name in names], dtype=torch.float64, device=self.args.device)
            if self.args.world_size > 1:
                dist.all_reduce(sums)
            sums = dict(zip(names, sums.tolist()))
            now = time.perf_counter()
            logs |= {name: sums[name] / sums["micro_batches"] for name in names[:4]}
            logs["samples_per_second"] = sums["samples"] / (now - self.logged_at)
            rates = self.lr_scheduler.get_last_lr()
            logs |= {f"lr_{group['name']}": rate for group, rate in zip(self.param_groups(), rates)}
            logs.pop("learning_rate", None)
            logs["broken_samples"] = int(sums["broken"])
            self.sums.clear()
            self.logged_at = now
        logs.pop("train_loss", None)  # the library's own mean, which counts accumulated micro-batches as one
        super().log(logs, start_time)

    def param_groups(self) -> list[dict]:
        return optimizer_groups(self.model, lr=self.lr, vision_lr=self.vision_lr)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Validate on the splits of `--val_dataset`; a checkpoint due at this step is written before."""
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        with self.compute_loss_context_manager():
            metrics = {f"eval_{name}": value for name, value in self.validate(self.state.global_step).items()}
        self.logged_at = time.perf_counter()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial) -> str:
        return str(self.partial or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """Write under `partial/`, then rename; older checkpoints go only after that."""
        folder = Path(self.args.output_dir)
        self.partial = folder / "partial"
        if self.args.should_save:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._barrier()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
            shutil.rmtree(self.partial, ignore_errors=True)
            kept = checkpoints_in(folder)
            advice = f"{kept[-1].name} is untouched, continue with --auto_resume" if kept else "none was before"
            raise NotSaved(
                f"{folder}: checkpoint {self.state.global_step} was not saved, is the disk full? ({error}); {advice}"
            ) from error
        self._barrier()
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / name, ignore_errors=True)
            (self.partial / name).rename(folder / name)
            self.partial.rmdir()
            for old in set(checkpoints_in(folder)) - {folder / name}:
                shutil.rmtree(old)
        self.partial = None
        self._barrier()
        self.logged_at = time.perf_counter()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights of a checkpoint; under DeepSpeed the engine's own files hold them already."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


def checkpoints_in(folder: Path) -> list[Path]:
    """`checkpoint-N` folders, latest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def broken_list(broken: list[tuple[str, str]], *, lines: int = 30) -> str:
    """A line for each broken sample, those drawn most often first: how often, id, cause. At most `lines` of them."""
    found = Counter(broken).most_common()
    shown = [f"  {times} x {id}: {cause}" for (id, cause), times in found[:lines]]
    return "\n".join(shown + ([f"  and {len(found) - lines} others"] if len(found) > lines else []))
