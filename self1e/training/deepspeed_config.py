"""What a DeepSpeed JSON may say here: ZeRO, precision and communication. The optimizer and its schedule are flags."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from self1e.errors import UserError
from self1e.files import read_json

# Section -> the flags that decide what it would decide.
DECIDED_BY_FLAGS = {
    "optimizer": "--lr, --vision_lr, --beta1 and --beta2",
    "scheduler": "--warmup_steps and the number of steps",
}


def read_deepspeed(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises UserError that names the file and the fix when it is no configuration, cannot be read, or would train
    something else than the flags say.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such DeepSpeed configuration")
    values = read_json(path, dict)
    if not isinstance(values.get("zero_optimization", {}), dict):
        raise UserError(f"{path} is no DeepSpeed configuration: zero_optimization is not an object")
    for section, flags in DECIDED_BY_FLAGS.items():
        if section in values:
            raise UserError(f"{path}: remove the section {section!r}; it is set by {flags}")
    for section in ("offload_optimizer", "offload_param"):
        # Only there the CPU optimizer was seen to follow both groups' rates, their betas and their schedule.
        if offloads(values, section) and zero_stage(values) != 3:
            raise UserError(f"{path}: {section} is for stage 3 here; start from configs/zero3_offload.json")
    if offloads(values, "offload_optimizer") and not values.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(f"{path}: remove zero_force_ds_cpu_optimizer; the offloaded optimizer is DeepSpeed's CPU Adam")
    return values


def zero_stage(values: dict[str, Any]) -> int:
    """The ZeRO stage that a configuration asks for, 0 to 3."""
    return values.get("zero_optimization", {}).get("stage", 0)


def offloads(values: dict[str, Any], section: str) -> bool:
    """Whether the optimizer ("offload_optimizer") or the parameters ("offload_param") are kept off the GPU."""
    return (values.get("zero_optimization", {}).get(section) or {}).get("device", "none") != "none"


def fill(values: dict[str, Any], args: Namespace, *, ranks: int, clip: float) -> dict[str, Any]:
    """The configuration with its "auto" entries as the flags say. ranks: processes. clip: norm of the gradients."""
    batch, accumulation = args.batch_size, args.grad_accumulation_steps
    known: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": batch * accumulation * ranks,
        "gradient_clipping": clip,
    }
    for name, value in known.items():
        if values.get(name, "auto") not in ("auto", value):
            raise UserError(f'{args.deepspeed}: {name} is {values[name]}, the flags say {value}; write "auto"')
    for kind in ("bf16", "fp16"):
        if values.get(kind, {}).get("enabled", "auto") not in ("auto", args.precision == kind):
            raise UserError(f'{args.deepspeed}: {kind} contradicts --precision {args.precision}; write "auto"')
    return values | known | {"zero_optimization": {"stage": 0, **values.get("zero_optimization", {})}}
