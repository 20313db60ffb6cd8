"""What produced the figures of an evaluation, in `settings.json` beside them, and when they are kept.

`settings.json` maps a split or benchmark to two blocks: `figures`, the settings that decide its figures, and `run`,
what else is worth knowing of the run (command, commit, devices). Finished and half-done work is kept if and only if
its `figures` block is the one of the present run.
"""

import ast
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import SoftFileLock, Timeout

from self1e import distributed
from self1e.files import read_json, write_json

BLOCK, BLOCKS = 4096, 64
LOCKED = 60  # seconds that evaluations in one folder wait for each other; a write takes milliseconds
PACKAGES = ("torch", "transformers", "numpy", "pillow", "opencv-python-headless", "pycocotools")
PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
Settings = dict[str, dict[str, Any]]


def fingerprint(checkpoint: str | Path) -> str:
    """A short text that tells checkpoints apart wherever they lie.

    It is a digest of a folder's file names, sizes, and blocks sampled all over its files. A name that is no folder (a
    hub id) is its own fingerprint.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(checkpoint)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".txt", ".safetensors", ".bin"}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def checkpoint_settings(version: str | Path, weights: str | Path | None) -> dict[str, str | None]:
    """The fingerprints of `--version` and of the weights over it, if any."""
    return {"version": fingerprint(version), "weights": None if weights is None else fingerprint(weights)}


def code() -> str:
    """A digest of the code that decides masks and replies: `self1e/model` and `self1e/data`, comments left out."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ("model", "data") for path in (PACKAGE / room).rglob("*.py")):
        digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]


def describe(figures: dict[str, Any], device: torch.device) -> Settings:
    """The two blocks of `settings.json`; all ranks call it together.

    figures: the settings that decide figures. The code joins them, and so do the kind of device and the versions of
    packages, because a pixel at the threshold or a near tie between two words may turn with them; the number of
    processes decides nothing.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    return {
        "figures": {
            **figures,
            "code": code(),
            "device": device.type,
            "packages": {package: _version(package) for package in PACKAGES},
        },
        "run": {
            "command": shlex.join(sys.orig_argv),
            "commit": _commit(),
            "self1e": _version("self1e"),
            "python": platform.python_version(),
            "processes": distributed.world_size(),
            "devices": sorted(set(distributed.gather(name))),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that this code was checked out from, `-dirty` where it was changed since; None outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class SettingsFile:
    """`settings.json` of a results folder."""

    def __init__(self, folder: Path):
        self.path = folder / "settings.json"

    def read(self) -> dict[str, Settings]:
        """Split or benchmark -> its settings. Raises ValueError where the file is damaged."""
        if not self.path.is_file():
            return {}
        return read_json(self.path, dict, remedy="delete it and use --overwrite_eval")

    def check(self, name: str, settings: Settings) -> None:
        """Raise ValueError, naming each difference, when what is on disk of `name` was made with other settings."""
        before, now = self.read().get(name, {}).get("figures"), json.loads(json.dumps(settings["figures"]))
        if before is None:
            differences = "settings that nobody wrote down"
        else:
            changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if not changed:
                return
            differences = "other settings: " + ", ".join(
                f"{key} was {_short(before, now, key)} and is {_short(now, before, key)}" for key in changed
            )
        raise ValueError(
            f"{self.path.parent} holds results of {name} that were made with {differences}. Use the same settings to "
            "continue, another --exp_name to keep both, or --overwrite_eval to evaluate anew"
        )

    def record(self, name: str, settings: Settings) -> None:
        """Write down the settings of `name`; evaluations of other splits may do so in the same folder at once.

        Raises OSError naming a lock that nobody lifts.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with SoftFileLock(lock, timeout=LOCKED):  # holds between machines too, and leaves no file
                write_json(self.path, {**self.read(), name: settings})
        except Timeout:
            raise OSError(f"{lock} is left over from an evaluation that was killed; remove it") from None


def _short(these: dict[str, Any], others: dict[str, Any], key: str) -> str:
    """The value of a setting, of a table only what differs."""
    value, other = these.get(key), others.get(key)
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: value.get(name) for name in {**value, **other} if value.get(name) != other.get(name)}
    return json.dumps(value, ensure_ascii=False)
