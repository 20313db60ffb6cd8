"""transformers' Trainer with our stream, two learning rates, losses by term, and checkpoints whole or absent."""

import errno
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.integrations import TensorBoardCallback

from self1e import distributed
from self1e.data.mixture import Mixture
from self1e.data.samples import EvalImage
from self1e.evaluation.results import Stopped
from self1e.evaluation.segmentation.metrics import Unit
from self1e.evaluation.segmentation.report import examples
from self1e.evaluation.watchdog import Watchdog
from self1e.flags import counted
from self1e.training import checkpoint, curves
from self1e.training.adaptation import optimizer_groups
from self1e.training.stop import StopRequest
from self1e.training.stream import Collate, MicroBatches, Stream, TooManyBroken, broken_list

BROKEN_SHARE, BROKEN_AFTER = 0.01, 100  # the run stops above this share, counted from this many samples on
TERMS = tuple(curves.TERMS)


class NotSaved(OSError):
    """A checkpoint could not be written."""


class Progress(ProgressCallback):
    """The library's progress bar, with log lines that fit a terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(state.global_step, logs))


def log_line(step: int, logs: dict[str, Any]) -> str:
    """One line for the terminal; TensorBoard holds every digit."""
    if "loss" in logs:
        terms = ", ".join(f"{name.removeprefix('mask_')} {logs[name]:.4f}" for name in TERMS[1:])
        rates = ", ".join(f"{key[3:]} {rate:.2e}" for key, rate in logs.items() if key.startswith("lr_"))
        figures = [f"loss {logs['loss']:.4f} ({terms})"]
        figures += [f"grad norm {logs['grad_norm']:.3f}"] if "grad_norm" in logs else []  # absent after fp16 overflow
        figures += [f"lr {rates}", f"{logs['samples_per_second']:.1f} samples/s"]
        figures += [counted(logs["broken_samples"], "broken sample")] if logs["broken_samples"] else []
    elif "train_runtime" in logs:
        rate = f"{logs['train_samples_per_second']:.1f} samples/s"
        figures = [f"trained for {logs['train_runtime']:,.0f} s, validations included, at {rate}"]
    else:
        scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        splits = dict.fromkeys(name.rpartition("_")[0] for name in scores)
        figures = ["validation:"] + [
            f"{split.replace('|', ' ')} gIoU {scores[f'{split}_giou']:.1%}, cIoU {scores[f'{split}_ciou']:.1%}"
            for split in splits
        ]
    return f"step {step}  epoch {logs['epoch']:.3f}  " + "  ".join(figures)


class Self1ETrainer(Trainer):
    """The Trainer with the arguments below beyond its own.

    Args:
        groups: of conversations, see `Self1EProcessor.collate`.
        lr, vision_lr: see `adaptation.optimizer_groups`.
        reduction: "sum" or "mean" of the accumulated micro-batches' gradients, before clipping.
        epoch_limit: the most micro-batches per epoch. first_epoch: see `MicroBatches`.
        validate: takes the step, returns figures to log; called every `eval_steps` on every rank.
        settings: what defines the run; see `checkpoint.defining_settings`.
        keep: how many checkpoints are kept. best: the figure of `validate` whose best step is kept, too, if any.
        stop: asks the run to stop after a step. watchdog: hears what this rank does.
    """

    def __init__(
        self,
        *,
        mixture: Mixture,
        encode,
        processor,
        groups: int,
        lr: float,
        vision_lr: float,
        reduction: str,
        epoch_limit: int | None,
        first_epoch: int,
        validate: Callable[[int], dict[str, float]],
        settings: dict[str, Any],
        keep: int,
        best: str | None,
        stop: StopRequest,
        watchdog: Watchdog,
        **kwargs,
    ):
        self.lr, self.vision_lr, self.validate, self.mixture = lr, vision_lr, validate, mixture
        self.epoch_limit, self.first_epoch = epoch_limit, first_epoch
        self.settings, self.keep, self.best = settings, keep, best
        self.stop, self.watchdog, self.stopped = stop, watchdog, False
        self.loss_is_scaled_for_ga = reduction == "sum"
        self.partial: Path | None = None
        self.saved_step = 0
        self.step_ids: list[list[str]] = []  # samples of each micro-batch since the last optimizer step
        self.step_terms: list[Tensor] = []  # its loss terms, (len(TERMS),)
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64)  # since the last log line
        self.micro_batches = self.samples = self.seen = 0
        self.broken: list[tuple[str, str]] = []
        self.logged_at = time.perf_counter()
        self.encode = encode
        stream = Stream(mixture, encode)
        super().__init__(train_dataset=stream, data_collator=Collate(processor, groups=groups), **kwargs)
        self.model_accepts_loss_kwargs = False
        self.pop_callback(ProgressCallback)
        self.add_callback(Progress)

    def get_train_dataloader(self) -> DataLoader:
        """Every rank reads its own micro-batches; no sampler of accelerate's stands between."""
        sampler = MicroBatches(
            self.mixture,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            limit=self.epoch_limit,
            first_epoch=self.first_epoch,
        )
        return DataLoader(
            Stream(self.mixture, self.encode),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=distributed.ignore_requests_to_stop,
            generator=torch.Generator(),  # workers' seeds come from here and not from the training's own stream
        )

    def _run_epoch(self, model, *args, **kwargs) -> None:
        """Nothing when a finished run is continued, where the library would take one step more."""
        if self.state.global_step < self.state.max_steps:
            model.train()
            self.stop.armed = True
            super()._run_epoch(model, *args, **kwargs)
            self.stop.armed = False
            self.watchdog.pause()
        else:
            self.control.should_training_stop = True

    def _load_callback_state(self) -> None:
        """As the library's, which has just taken from the checkpoint how often to log, save and validate.

        The flags of a continued run say so anew.
        """
        super()._load_callback_state()
        self.state.compute_steps(self.args, self.state.max_steps)

    def get_batch_samples(self, *args, **kwargs):
        """The micro-batches of one optimizer step, as the library's; the watchdog knows that they are waited for."""
        self.watchdog.reading()
        return super().get_batch_samples(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW over both groups, without weight decay; DeepSpeed's own where its states are offloaded to the CPU."""
        if self.optimizer is None:
            options: dict[str, Any] = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "weight_decay": 0.0}
            if self.is_deepspeed_enabled and self.args.hf_deepspeed_config.is_offload():
                from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled at its first use

                self.optimizer = DeepSpeedCPUAdam(self.param_groups(), lr=self.lr, adamw_mode=True, **options)
            else:
                self.optimizer = torch.optim.AdamW(self.param_groups(), lr=self.lr, **options)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One forward and backward pass.

        The library's own step also sets thousands of modules to training mode each time; here the epoch does it once.
        """
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        if not self.loss_is_scaled_for_ga:
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    def floating_point_ops(self, inputs) -> int:
        """None are counted: the library's estimate walks every module for each micro-batch."""
        return 0

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The model's loss. Its terms stay on the device; the last micro-batch of a step checks all of the step."""
        if "failed" in inputs:
            raise inputs["failed"]
        ids, replaced = inputs.pop("ids"), inputs.pop("replaced")
        self.watchdog.computing(ids)
        output = model(**inputs)
        zero = output.loss.new_zeros(())
        terms = [output.loss, *(output.losses.get(name, zero) for name in TERMS[1:])]
        self.step_terms.append(torch.stack([term.detach().float() for term in terms]))
        self.step_ids.append(ids)
        self.broken += replaced
        if self.accelerator.sync_gradients:
            self.check()
        return output.loss

    def check(self) -> None:
        """Agree with all ranks, once per optimizer step, that it may be taken, and whether it is the last one.

        Raises on all ranks together FloatingPointError when a loss of the step is not finite, TooManyBroken above the
        tolerated share of broken samples.
        """
        terms = torch.stack(self.step_terms)
        samples = sum(map(len, self.step_ids))
        self.seen += samples
        mine = torch.tensor([self.seen, len(self.broken), self.stop.cause is not None, 0], dtype=torch.float64)
        mine = mine.to(terms.device, non_blocking=True)
        mine[3] = (~terms[:, 0].isfinite()).sum()
        seen, broken, stops, infinite = distributed.total(mine).tolist()
        if infinite:
            causes = [
                f"  {', '.join(f'{name} {value:.4g}' for name, value in zip(TERMS, row.tolist()))} in {', '.join(ids)}"
                for row, ids in zip(terms, self.step_ids)
                if not row[0].isfinite()
            ]
            causes = [cause for part in distributed.gather(causes) for cause in part]
            text = "the loss is not finite; the samples of the micro-batch:\n" + "\n".join(causes)
            raise distributed.alike(FloatingPointError(text))
        if broken > BROKEN_SHARE * max(seen, BROKEN_AFTER):
            share = f"{broken:.0f} broken samples met in reading {seen:.0f}, more than {BROKEN_SHARE:.0%}"
            found = [pair for part in distributed.gather(self.broken) for pair in part]
            raise distributed.alike(TooManyBroken(f"{share}:\n{broken_list(found)}"))
        self.stopped = stops > 0
        self.sums = self.sums.to(terms.device) + terms.double().sum(0)
        self.micro_batches, self.samples = self.micro_batches + len(terms), self.samples + samples
        self.step_ids, self.step_terms = [], []

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """As the library's; a run that is asked to stop saves, and neither validates nor goes on."""
        if self.stopped:
            self.control.should_training_stop = True
            self.control.should_save = self.saved_step != self.state.global_step
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term's mean over ranks and micro-batches since the last line, both learning rates, samples/s."""
        if "loss" in logs and self.micro_batches:
            counts = [self.micro_batches, self.samples, len(self.broken)]
            sums = torch.cat([self.sums, self.sums.new_tensor(counts)])
            *means, micro_batches, samples, broken = distributed.total(sums).tolist()
            now = time.perf_counter()
            logs |= {name: value / micro_batches for name, value in zip(TERMS, means)}
            logs["samples_per_second"] = samples / (now - self.logged_at)
            rates = [float(rate) for rate in self.lr_scheduler.get_last_lr()] if self.lr_scheduler else []
            logs |= {f"lr_{group['name']}": rate for group, rate in zip(self.param_groups(), rates)}
            logs.pop("learning_rate", None)
            logs["broken_samples"] = int(broken)
            self.sums, self.micro_batches, self.samples = torch.zeros_like(self.sums), 0, 0
            self.logged_at = now
        logs.pop("train_loss", None)  # the library's own mean, which counts accumulated micro-batches as one
        super().log(logs, start_time)

    def param_groups(self) -> list[dict]:
        assert self.model is not None
        return optimizer_groups(self.model, lr=self.lr, vision_lr=self.vision_lr)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Validate on the splits of `--val_dataset`; a checkpoint due at this step is written before.

        A run that is asked to stop leaves the validation at its next photo, saves, and has no figures of this step.
        """
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.watchdog.pause()
        try:
            with self.compute_loss_context_manager():
                figures = self.validate(self.state.global_step)
        except Stopped:
            self.stopped = self.control.should_training_stop = True
            self.control.should_save = self.saved_step != self.state.global_step
            return {}
        finally:
            self.watchdog.pause()
        if self.best:
            self._keep_best(figures[self.best])
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.logged_at = time.perf_counter()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def show(self, name: str, split: Sequence[EvalImage], units: Sequence[Unit]) -> None:
        """Add pictures of a validated split to TensorBoard: `<split>/worst`, `/median` and `/best`, by IoU.

        They are drawn from the masks that the units hold, on rank 0, which alone has a writer. It is the one of the
        library's callback, because TensorBoard reads one file per run.
        """
        callbacks = self.callback_handler.callbacks
        writer = next((x.tb_writer for x in callbacks if isinstance(x, TensorBoardCallback)), None)
        if writer is not None:
            for title, picture in examples(split, units).items():
                pixels = np.asarray(picture)
                writer.add_image(f"{name}/{title}", pixels, self.state.global_step, dataformats="HWC")

    def _keep_best(self, value: float) -> None:
        folder = self.folder
        if distributed.on_main(lambda: checkpoint.remember_best(folder, self.state.global_step, value)):
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model, trial=None)

    @property
    def folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _get_output_dir(self, trial) -> str:
        return str(self.partial or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """Write below `partial/`, seal, rename; older checkpoints go only after that.

        A rank that cannot write raises NotSaved alone and so ends the run, because the others may wait inside of the
        libraries' own collectives.
        """
        self.watchdog.pause()
        folder, name = self.folder, f"checkpoint-{self.state.global_step}"
        self.partial = folder / "partial"
        distributed.on_main(lambda: shutil.rmtree(folder / "partial", ignore_errors=True))
        try:
            super()._save_checkpoint(model, trial)
            distributed.barrier()
            checkpoint.seal(folder / "partial" / name, self.settings)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not cannot_write(error):
                raise
            if distributed.world_size() == 1:  # another rank that still writes would speak of a missing folder instead
                shutil.rmtree(folder / "partial", ignore_errors=True)
            kept = checkpoint.checkpoints_in(folder)
            advice = f"{kept[-1].name} is untouched, continue with --auto_resume" if kept else "none was before"
            raise NotSaved(
                f"{folder}: checkpoint {self.state.global_step} was not saved, is the disk full? ({error}); {advice}"
            ) from error
        distributed.on_main(lambda: self._publish(folder, name))
        self.partial, self.saved_step = None, self.state.global_step
        self.logged_at = time.perf_counter()

    def _publish(self, folder: Path, name: str) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "partial" / name).rename(folder / name)
        (folder / "partial").rmdir()
        checkpoint.prune(folder, self.keep)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint; under DeepSpeed the engine's own files hold them already."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)


def cannot_write(error: Exception) -> bool:
    """Whether an error is the disk's: torch reports a full one as RuntimeError, safetensors as its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
    return isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
