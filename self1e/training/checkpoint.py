"""Checkpoints of a run: each is whole or absent, and only the run that wrote it continues from it.

Beside the Trainer's files a `checkpoint-N` holds `settings.json`, the settings that define its run, and, written last,
`manifest.json` with the size and SHA-256 of every file.
"""

import importlib
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch.serialization import add_safe_globals, get_unsafe_globals_in_checkpoint

from self1e.distributed import everywhere, gather, on_main, say, share
from self1e.errors import UserError
from self1e.files import digest, fault, read_json, sync_folder, write_json

MANIFEST, SETTINGS, BEST = "manifest.json", "settings.json", "best.json"
ENDING = 10  # seconds in which the data workers of a run that was killed end, and with them its hold on the folder
# Flags that a continued run may change, some because what they lead to is compared. Every other flag defines the run.
FREE = frozenset(
    "version model_weights dataset_dir data_dir custom_data workers max_steps save_steps save_total_limit keep_best "
    "print_freq report_to exp_name log_base_dir resume auto_resume resume_anyway overwrite timeout "
    "config local_rank deepspeed attn_implementation gradient_checkpointing save_published_layout val_dataset "
    "eval_steps no_eval eval_only eval_all_datasets eval_all_only eval_visualize overwrite_eval "
    "allow_outside splits final_splits command run_dir eval_precision".split()
)
# What the tensors of a checkpoint depend on: a difference here cannot be waived.
STRUCTURE = frozenset(
    "ranks zero_stage use_llm_lora freeze_llm optimize_vision use_vision_lora lora_r lora_target_modules "
    "lora_from_layer trainable_embeddings mask_features precision".split()
)
# What a checkpoint's pickles hold besides tensors and plain containers: states of the random generators, which the
# Trainer loads, and classes of DeepSpeed. A whole package is too much: `numpy.testing` runs any text.
GENERATORS = frozenset(
    "numpy.ndarray numpy.dtype numpy._core.multiarray._reconstruct numpy.core.multiarray._reconstruct".split()
)
DEEPSPEED = frozenset(
    "deepspeed.runtime.zero.config.ZeroStageEnum deepspeed.utils.tensor_fragment.fragment_address "
    "deepspeed.runtime.fp16.loss_scaler.LossScaler deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler".split()
)


def checkpoints_in(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders, the latest last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def defining_settings(flags: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What must be the same when a run is continued: all flags but `FREE` ones, and `more`."""
    plain = {name: value for name, value in flags.items() if name not in FREE} | more
    return {name: str(value) if isinstance(value, Path) else value for name, value in sorted(plain.items())}


def seal(folder: Path, settings: dict[str, Any]) -> None:
    """Add settings and manifest to a checkpoint and put all of it on the disk. All ranks call it together."""
    on_main(lambda: write_json(folder / SETTINGS, settings))
    files = on_main(lambda: sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    parts = gather(everywhere(lambda: {name: digest(folder / name) for name in share(files)}))
    on_main(lambda: write_json(folder / MANIFEST, {name: entry for part in parts for name, entry in part.items()}))
    on_main(lambda: sync_folder(folder))


def faults(folder: Path) -> list[str]:
    """What keeps a checkpoint from being whole, one line each. All ranks call it together."""
    try:
        manifest = on_main(lambda: read_json(folder / MANIFEST, dict))
    except UserError as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    if SETTINGS not in manifest:
        return [f"{MANIFEST} does not name {SETTINGS}"]
    found = gather(everywhere(lambda: {name: fault(folder / name, manifest[name]) for name in share(list(manifest))}))
    return [f"{name} {problem}" for part in found for name, problem in part.items() if problem]


def code_in(folder: Path) -> list[str]:
    """What loading the checkpoint's pickles would call, beyond the classes that the libraries write.

    A link, or DeepSpeed's file `latest` with a path to elsewhere, would have pickles loaded that nobody looked at.
    """
    found = [f"{path.relative_to(folder)} is a link" for path in sorted(folder.rglob("*")) if path.is_symlink()]
    latest = folder / "latest"
    if latest.is_file() and latest.read_text(errors="replace").strip() not in {path.name for path in folder.iterdir()}:
        found.append("latest names no folder of the checkpoint")
    for path in sorted(folder.rglob("*.p[th]*")):
        try:
            names = get_unsafe_globals_in_checkpoint(path)
        except Exception as error:  # a pickle that is no checkpoint of torch may raise almost anything
            return [f"{path.name} is no file of torch ({error})"]
        found += [f"{path.name} asks for {name}" for name in names if name not in GENERATORS | DEEPSPEED]
    return found


def load_tensors_only(*, deepspeed: bool) -> None:
    """Have torch refuse code in every pickle that it loads from here on, also where a library asks for less.

    It is a second lock behind `code_in`. deepspeed: its own classes are let through.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if deepspeed:
        names = [name.rpartition(".") for name in sorted(DEEPSPEED)]
        add_safe_globals([getattr(importlib.import_module(module), name) for module, _, name in names])


def choose(checkpoints: list[Path], say: Callable[[str], None]) -> Path | None:
    """The latest whole checkpoint; what is passed over is said. All ranks call it together.

    Raises ValueError when there are checkpoints but none is whole.
    """
    broken: list[str] = []
    for checkpoint in reversed(checkpoints):
        problems = faults(checkpoint)
        if not problems:
            if broken:
                say("\n".join(["a later checkpoint is damaged and passed over:", *broken]))
            return checkpoint
        broken += [f"  {checkpoint.name}: {problem}" for problem in problems]
    if broken:
        lines = "\n".join(broken)
        raise ValueError(f"{checkpoints[0].parent}: no checkpoint is whole; start anew with --overwrite:\n{lines}")
    return None


def check_resumable(checkpoint: Path, settings: dict[str, Any], *, max_steps: int | None, anyway: bool) -> None:
    """Refuse to continue from a checkpoint that another run wrote.

    Raises ValueError that names every difference, code that loading would run, or a checkpoint beyond `--max_steps`.
    """
    code = code_in(checkpoint)
    if code:
        raise ValueError(f"{checkpoint} would run code when it is loaded, and is refused:\n  " + "\n  ".join(code))
    if max_steps is not None and step_of(checkpoint) > max_steps:
        raise ValueError(
            f"{checkpoint} is beyond --max_steps {max_steps}: raise --max_steps, or start anew with --overwrite"
        )
    then = read_json(checkpoint / SETTINGS, dict)
    then = {name: False for name, value in settings.items() if value is False} | then  # a switch it did not know
    differing = {name: (then.get(name), settings[name]) for name in settings if then.get(name) != settings[name]}
    fatal = STRUCTURE & differing.keys()
    if fatal or (differing and not anyway):
        shown = fatal if anyway else differing
        pairs = {name: _apart(*differing[name]) for name in shown}
        lines = "\n".join(f"  {name}: {before!r} then, {now!r} now" for name, (before, now) in pairs.items())
        ways = "" if fatal else ", or --resume_anyway to continue as another run"
        raise ValueError(f"{checkpoint} has other settings; give the same ones, another --exp_name{ways}:\n{lines}")


def _apart(one: Any, other: Any) -> tuple[Any, Any]:
    """Two values that differ; of tables only the entries that do."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keep a second training out of the folder, where each would delete what the other writes. For the first rank.

    A file system without locks lets it in, and the message says so. Raises ValueError where another one is at work.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=ENDING)
    except NotImplementedError:
        say(f"{run_dir}: this file system has no locks, so nothing keeps a second training out of the folder")
    except Timeout:
        raise ValueError(
            f"{run_dir}: another training is at work in this folder; wait for its end, or give another --exp_name. "
            f"If there is none, its machine went down: remove {run_dir / '.lock'}"
        ) from None
    try:
        shutil.rmtree(run_dir / "checkpoints" / "partial", ignore_errors=True)  # of a run that was killed
        yield
    finally:
        (run_dir / ".lock").unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # there is something in it, unless the run was refused
            run_dir.rmdir()


def check_unused(run_dir: Path, *, overwrite: bool) -> None:
    """Refuse to train anew over an earlier run, or remove what it left. The first rank alone calls it.

    Raises ValueError that names both ways out.
    """
    checkpoints = checkpoints_in(run_dir / "checkpoints")
    left = [*checkpoints, *run_dir.glob("ckpt_model*"), *run_dir.glob("eval/*.json")]
    if left and not overwrite:
        ways = "continue it with --auto_resume, " if checkpoints else ""
        raise ValueError(
            f"{run_dir} holds an earlier run ({left[0].relative_to(run_dir)}): {ways}replace it with --overwrite, or "
            "give another --exp_name"
        )
    for name in ("checkpoints", "ckpt_model", "ckpt_model_published", "tensorboard", "validation", "eval"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def remember_best(folder: Path, step: int, value: float) -> bool:
    """Note the step of the best validation so far; returns whether this one is it."""
    earlier = read_json(folder / BEST, dict) if (folder / BEST).is_file() else None
    # A run that was killed in between has the note without the checkpoint, and comes here again.
    if earlier is not None and value <= earlier["value"] and (folder / f"checkpoint-{earlier['step']}").is_dir():
        return False
    write_json(folder / BEST, {"step": step, "value": value})
    return True


def prune(folder: Path, limit: int) -> None:
    """Keep the latest `limit` checkpoints and the best one. A folder that cannot be removed is left."""
    best = read_json(folder / BEST, dict)["step"] if (folder / BEST).is_file() else None
    for old in checkpoints_in(folder)[:-limit]:
        if step_of(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(args: Namespace, settings: dict) -> Path | None:
    """The checkpoint to continue from, if any: whole, and of a run with the same settings. All ranks call it together.

    Raises ValueError that says what is wrong with it.
    """
    if args.resume:
        if not (args.resume / "trainer_state.json").is_file():
            raise ValueError(f"--resume {args.resume}: no checkpoint there; expected a checkpoint-N folder of a run")
        problems = faults(args.resume)
        if problems:
            others = [path for path in checkpoints_in(args.resume.parent) if path.name != args.resume.name]
            advice = f"; {others[-1]} is there, too" if others else ""
            raise ValueError(f"--resume {args.resume} is not whole{advice}:\n  " + "\n  ".join(problems))
        found = args.resume
    elif args.auto_resume:
        # As the first rank lists them: on a shared disk another node may not see the latest one yet.
        found = choose(on_main(lambda: checkpoints_in(args.run_dir / "checkpoints")), say)
    else:
        return None
    if found is not None:
        check_resumable(found, settings, max_steps=args.max_steps, anyway=args.resume_anyway)
        load_tensors_only(deepspeed=bool(args.deepspeed))
    return found
