"""Checkpoints of a run: each appears whole or not at all, and says with which settings it was written.

<run>/checkpoints/checkpoint-N/
    args.yaml            flags, what makes the run this one, commit and versions of the packages
    state.pt             weights, optimizer and gradient scaler; under DeepSpeed the folder `engine` instead
    random_<rank>.pt     states of torch's random generators of each rank
"""

import os
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch.serialization import add_safe_globals

from self1e import distributed
from self1e.errors import UserError
from self1e.files import sync
from self1e.model.config import LOSS_FLAGS, SWITCHES, Self1EConfig
from self1e.training.adapters import ADAPTERS
from self1e.training.args import ROOT

ARGS, STATE, ENGINE, PARTIAL = "args.yaml", "state.pt", "engine", "partial"
# What a run leaves that cannot be had in a moment, and all folders that it writes.
RESULTS = "checkpoints/checkpoint-* ckpt_model* eval/*.json eval_vqa/*.json".split()
WRITTEN = "checkpoints ckpt_model ckpt_model_published tensorboard validation eval eval_vqa".split()
# With other values of these flags the checkpoint is another run's.
DECIDING = ["dataset", "sample_rates", "seed", "start_epoch", "batch_size", "trainable_embeddings", "precision"]
DECIDING += [*ADAPTERS, *SWITCHES, *LOSS_FLAGS]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed")


def checkpoints_in(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders, the latest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done when it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def settings_of(args: Namespace, *, sets: Mapping[str, int], ranks: int) -> dict[str, Any]:
    """What a checkpoint's `args.yaml` holds. sets: samples of each training set. ranks: processes of the run.

    `run` is what a continued run must have in common with the one that wrote the checkpoint: no paths.
    """
    config: Any = Self1EConfig.from_pretrained(args.version)
    sizes = [[part.num_hidden_layers, part.hidden_size] for part in (config.text_config, config.vision_config)]
    plain = {name: x if isinstance(x, int | float | str | None) else str(x) for name, x in vars(args).items()}
    return {
        "run": {
            "layers and width of LLM and ViT": sizes,
            "sets": [f"{name}: {size}" for name, size in sets.items()],
            "accumulation x ranks": args.grad_accumulation_steps * ranks,
            **{name: plain[name] for name in DECIDING},
        },
        "engine": {"deepspeed": bool(args.deepspeed), "zero_stage": args.zero_stage, "ranks": ranks},
        "flags": dict(sorted(plain.items())),
        "code": {"commit": commit(), **{x.name: x.version for x in distributions() if x.name in PACKAGES}},
    }


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` behind it if the code was changed since; None outside a checkout."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def find(args: Namespace) -> Path | None:
    """The checkpoint to continue from, or None to start anew. UserError where that would harm an earlier run."""
    if args.resume and args.resume not in checkpoints_in(args.resume.parent):
        raise UserError(f"--resume {args.resume}: no checkpoint there; expected a checkpoint-N folder of a run")
    latest = checkpoints_in(args.run_dir / "checkpoints")[-1:]
    if latest and (args.auto_resume or args.resume and args.resume.samefile(latest[0])):
        return latest[0]
    results = [path for names in RESULTS for path in args.run_dir.glob(names)]
    if results and not args.overwrite:
        raise UserError(
            f"{args.run_dir} holds an earlier run ({results[0].name}): continue its last checkpoint with "
            "--auto_resume, replace it with --overwrite, or give another --exp_name"
        )
    if args.resume:
        return args.resume
    for source in (args.version, args.model_weights):
        if source is not None and Path(source).resolve().is_relative_to(args.run_dir.resolve()):
            raise UserError(f"{source} is part of {args.run_dir}, which --overwrite replaces: give another --exp_name")
    return None


def check_resumable(checkpoint: Path, now: dict[str, Any], *, anyway: bool) -> None:
    """Raise UserError for a checkpoint of another run, unless `anyway`, and print every setting that differs.

    now: `settings_of` this run.
    """
    then = yaml.safe_load((checkpoint / ARGS).read_text(encoding="utf-8"))

    def changed(*parts: str) -> str:
        """A line for each entry of these parts that is not the same."""
        old, new = ({name: x for part in parts for name, x in settings[part].items()} for settings in (then, now))
        names = [name for name in old | new if old.get(name) != new.get(name)]
        return "".join(f"\n  {name}: {old.get(name)!r} then, {new.get(name)!r} now" for name in names)

    if changed("engine") and (then["engine"]["deepspeed"] or now["engine"]["deepspeed"]):
        raise UserError(f"{checkpoint}: DeepSpeed continues with its ranks and its stage:{changed('engine')}")
    if changed("run") and not anyway:
        raise UserError(
            f"{checkpoint} was written by another run; give the same settings or another --exp_name, or "
            f"--resume_anyway to continue as another run:{changed('run')}"
        )
    distributed.say(f"settings that differ from those of {checkpoint}:{changed(*now) or ' none'}")


def merged(checkpoint: Path | None, run_dir: Path, *, steps: int) -> bool:
    """Whether the run's `ckpt_model` was made from this checkpoint, which is that of its last step."""
    result = run_dir / "ckpt_model" / "config.json"
    if checkpoint is None or checkpoint.parent != run_dir / "checkpoints" or not result.is_file():
        return False
    return step_of(checkpoint) >= steps and result.stat().st_mtime >= (checkpoint / ARGS).stat().st_mtime


def save(
    folder: Path, step: int, settings: dict[str, Any], best: int | None, *, accelerator: Accelerator, model, optimizer
) -> None:
    """Write `checkpoint-<step>` into `folder` under a partial name, put it on the disk, and rename it.

    Then the latest `--save_total_limit` checkpoints stay, and that of the step `best`, as the first rank gives it. All
    ranks call it together, with what `accelerator.prepare` returned.
    """
    partial, name = folder / PARTIAL, f"checkpoint-{step}"
    distributed.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
    partial.mkdir(parents=True, exist_ok=True)  # every rank: on a shared disk another's folder may come late
    if settings["engine"]["deepspeed"]:
        from deepspeed.runtime.zero.config import ZeroStageEnum

        # Python before 3.11.4 would write a call of getattr, which `load` must not run.
        ZeroStageEnum.__reduce_ex__ = lambda stage, _: (ZeroStageEnum, (stage.value,))
        model.save_checkpoint(str(partial), tag=ENGINE)
    elif distributed.is_main():
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        weights = accelerator.unwrap_model(model).state_dict()
        torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "scaler": scaler}, partial / STATE)
    # States of the generators that dropout and stochastic depth draw from.
    states = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    torch.save(states, partial / f"random_{distributed.rank()}.pt")
    if distributed.is_main():
        (partial / ARGS).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    sync(partial)
    distributed.gather(None)

    def publish() -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        partial.rename(folder / name)
        prune(folder, settings["flags"]["save_total_limit"], best)

    distributed.on_main(publish)


def load(checkpoint: Path, *, accelerator: Accelerator, model, optimizer) -> int:
    """Restore what `save` wrote, into what `accelerator.prepare` returned; its step. No code of a pickle is run.

    A rank that the checkpoint does not know keeps the random states that the seed gave it.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks torch for less
    if (checkpoint / ENGINE).is_dir():
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])  # in its own files
        model.load_checkpoint(str(checkpoint), tag=ENGINE)
    else:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        accelerator.unwrap_model(model).load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
    own = checkpoint / f"random_{distributed.rank()}.pt"
    if own.is_file():
        states = torch.load(own, map_location="cpu", weights_only=True)
        torch.set_rng_state(states["cpu"])
        if states["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    return step_of(checkpoint)


def prune(folder: Path, limit: int, best: int | None) -> None:
    """Keep the latest `limit` checkpoints and that of the step `best`. A folder that cannot be removed is left."""
    for old in checkpoints_in(folder)[:-limit]:
        if step_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def remove_earlier(run_dir: Path, *, results: bool) -> None:
    """Remove the curves of an earlier run of this name, and what else it wrote if `results`."""
    for name in WRITTEN if results else ["tensorboard"]:
        shutil.rmtree(run_dir / name, ignore_errors=True)
