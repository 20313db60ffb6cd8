"""What a DeepSpeed JSON may say here: ZeRO, precision and communication. The optimizer and its schedule are flags."""

import json
from pathlib import Path
from typing import Any

# Section -> the flags that decide what it would decide.
DECIDED_BY_FLAGS = {
    "optimizer": "--lr, --vision_lr, --beta1 and --beta2",
    "scheduler": "--warmup_steps and the number of steps",
}


def read_deepspeed(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises ValueError that names the file and the fix when it is no configuration, cannot be read, or would train
    something else than the flags say.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no DeepSpeed configuration ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization", {}), dict):
        raise ValueError(
            f"{path} is no DeepSpeed configuration: expected an object, with zero_optimization as another"
        )
    for section, flags in DECIDED_BY_FLAGS.items():
        if section in values:
            raise ValueError(f"{path}: remove the section {section!r}; it is set by {flags}")
    for section in ("offload_optimizer", "offload_param"):
        # Only there the CPU optimizer was seen to follow both groups' rates, their betas and their schedule.
        if offloads(values, section) and zero_stage(values) != 3:
            raise ValueError(f"{path}: {section} is for stage 3 here; start from configs/zero3_offload.json")
    if offloads(values, "offload_optimizer") and not values.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"{path}: remove zero_force_ds_cpu_optimizer; the offloaded optimizer is DeepSpeed's CPU Adam"
        )
    return values


def zero_stage(values: dict[str, Any]) -> int:
    """The ZeRO stage that a configuration asks for, 0 to 3."""
    return values.get("zero_optimization", {}).get("stage", 0)


def offloads(values: dict[str, Any], section: str) -> bool:
    """Whether the optimizer ("offload_optimizer") or the parameters ("offload_param") are kept off the GPU."""
    return (values.get("zero_optimization", {}).get(section) or {}).get("device", "none") != "none"
