"""What a DeepSpeed JSON may say here: ZeRO, precision and communication. The optimizer and its schedule are flags."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from self1e.errors import UserError
from self1e.files import read_json


def read_deepspeed(path: Path) -> dict[str, Any]:
    """Read a configuration. Raises UserError when it cannot be read or would train something else than the flags."""
    values = read_json(path, dict)
    for section in values.keys() & {"optimizer", "scheduler"}:
        raise UserError(f"{path}: remove the section {section!r}; flags decide, such as --lr and --warmup_steps")
    zero = values["zero_optimization"] = {"stage": 0} | values.get("zero_optimization", {})
    if zero["stage"] != 3 and (offloads(values, "offload_optimizer") or offloads(values, "offload_param")):
        # Only there the CPU optimizer was seen to follow both groups' rates, their betas and their schedule.
        raise UserError(f"{path}: offloading is for stage 3 here; start from configs/zero3_offload.json")
    return values


def offloads(values: dict[str, Any], section: str) -> bool:
    """Whether the optimizer ("offload_optimizer") or the parameters ("offload_param") are kept off the GPU."""
    return (values["zero_optimization"].get(section) or {}).get("device", "none") != "none"


def fill(values: dict[str, Any], args: Namespace, *, ranks: int, clip: float) -> dict[str, Any]:
    """The configuration with its "auto" entries as the flags say. ranks: processes. clip: norm of the gradients."""
    batch, accumulation = args.batch_size, args.grad_accumulation_steps
    known: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": batch * accumulation * ranks,
        "gradient_clipping": clip,
    }
    said = {name: values.get(name, "auto") for name in known}
    said |= {kind: values.get(kind, {}).get("enabled", "auto") for kind in ("bf16", "fp16")}
    for name, value in (known | {kind: args.precision == kind for kind in ("bf16", "fp16")}).items():
        if said[name] not in ("auto", value):
            raise UserError(f'{args.deepspeed}: {name} is {said[name]}, the flags say {value}; write "auto"')
    return values | known
