"""Every path that a program takes, absent or spoilt: one message that names it, exit code 1 or 2, no traceback.

An exception other than SystemExit that leaves a program is a traceback on a user's screen, and fails the test as such.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from self1e import Self1EForSegmentation, cli
from self1e.evaluation.vqa import run as vqa
from self1e.flags import guarded
from self1e.training import run as training

PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "train": lambda argv: guarded(lambda: training.main(argv)),
    "vqa": lambda argv: guarded(lambda: vqa.main(argv)),
}


def spoil(path: Path, kind: str) -> str:
    """Put something wrong at a path where nothing is yet; returns the argument that names it."""
    if kind == "folder":
        path.mkdir()
    elif kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    elif kind == "foreign config":
        path.mkdir()
        (path / "config.json").write_bytes(CONTENTS["binary"])
    elif kind == "below a file":
        path.write_bytes(b"")
        return str(path / "inside.png")
    elif kind == "system":  # not even root may write there
        return f"/proc/{path.name}/inside.png"
    return str(path)


CONTENTS = {"empty": b"", "binary": bytes(range(256)) * 8, "truncated": b'[{"image": "a.jpg", "mask": '}
FILE = ("absent", "folder", *CONTENTS)  # where a file is read
MODEL = ("absent", "folder", "empty", "binary", "foreign config")
READ = ("absent", "empty", "binary")  # where a folder is read
WRITTEN = ("below a file", "system")  # where a folder or a file is written

# program -> its right command line, and for each path in it what may be wrong there. Names in braces are paths.
LINES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "segment": (
        "--version {version} --model_weights {weights} --image {image} --prompts_file {prompts} --output {output}",
        {
            "version": MODEL,
            "weights": MODEL,
            "image": ("absent", "folder", "empty", "binary"),
            "prompts": ("absent", "folder", "empty", "binary"),
            "output": (*WRITTEN, "empty"),
        },
    ),
    "chat": (
        "--version {version} --image {image} --prompt it --output {output}",
        {"version": MODEL, "image": ("absent", "folder"), "output": WRITTEN},
    ),
    "demo": ("--version {version} --model_weights {weights} --port 45871", {"version": MODEL, "weights": MODEL}),
    "export": (
        "{predictions} --to coco --output {output}",
        {"predictions": ("absent", "empty", "folder", "binary"), "output": (*WRITTEN, "folder")},
    ),
    "check-data": ("{table} --output {output}", {"table": FILE, "output": (*WRITTEN, "folder")}),
    "convert": (
        "{version} {target} --layout self1e",
        {"version": MODEL, "target": (*WRITTEN, "empty", "folder")},
    ),
    "score": (
        "--compare {units} {units} --json {output} --pictures {folder} --dataset_dir {tree}",
        {"units": FILE, "output": (*WRITTEN, "folder"), "folder": (*WRITTEN, "empty")},
    ),
    "card": ("{version} --results {results}", {"version": MODEL, "results": ("absent", "empty")}),
    "pictures": (
        "--version {version} --image {image} --prompt it --output {output}",
        {"version": MODEL, "image": ("absent", "folder", "empty", "binary"), "output": (*WRITTEN, "empty")},
    ),
    "ablate": ("--suite method --output {output}", {"output": (*WRITTEN, "empty")}),
    "make-shapes": ("{output}", {"output": (*WRITTEN, "empty")}),
    "make-tiny": ("{output}", {"output": (*WRITTEN, "empty")}),
    "data": (
        "get ade20k --to {tree} --downloads {output}",
        {"tree": (*WRITTEN, "empty"), "output": (*WRITTEN, "empty")},
    ),
    "train": (
        "--version {version} --model_weights {weights} --exp_name e --log_base_dir {output} --dataset custom "
        "--custom_data {table} --val_dataset custom|{val} --workers 0 --precision fp32 --max_steps 1",
        {"version": MODEL, "weights": MODEL, "table": FILE, "val": FILE, "output": (*WRITTEN, "empty")},
    ),
    "train ": (
        "--version {version} --exp_name e --dataset_dir {dataset} --data_dir {data} --config {config} --workers 0 "
        "--log_base_dir {output} --resume {checkpoint} "
        "--dataset refer_seg||vqa --refer_seg_data refcoco --vqa_data gqa",
        {"dataset": READ, "data": READ, "config": ("absent", "folder", "binary", "truncated"), "checkpoint": READ},
    ),
    "train  ": (
        "--version {version} --exp_name e --eval_only --val_dataset custom|{val} --log_base_dir {output}",
        {"version": MODEL, "val": FILE, "output": (*WRITTEN, "empty")},
    ),
    "vqa": (
        "--version {version} --model_weights {weights} --exp_name e --log_base_dir {output} --data_dir {data} "
        "--datasets pope --device cpu --workers 0",
        {"version": MODEL, "weights": MODEL, "data": READ, "output": (*WRITTEN, "empty")},
    ),
}
CASES = [(p, name, kind) for p, (_, names) in LINES.items() for name, kinds in names.items() for kind in kinds]


@pytest.fixture(scope="session")
def right(tmp_path_factory, version, shapes_tree) -> dict[str, Path]:
    """What every path of `LINES` names when it is right."""
    folder = tmp_path_factory.mktemp("right")
    Image.linear_gradient("L").convert("RGB").save(folder / "image.jpg")
    Image.new("L", (256, 256), 255).save(folder / "mask.png")
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "prompt"), ("image.jpg", "mask.png", "it")])
    (folder / "prompts.txt").write_text("it\n")
    (folder / "config.yaml").write_text("workers: 0\n")
    unit = {"id": "1", "image": "a", "text": "it", "I": 1, "U": 2, "target_pixels": 1, "predicted_pixels": 2}
    (folder / "units.jsonl").write_text(json.dumps(unit) + "\n")
    assert cli.main(["segment", "--version", version, "--image", str(folder / "image.jpg"), "--prompt", "it",
                     "--output", str(folder / "predictions")]) == 0  # fmt: skip
    copied = folder / "version"
    shutil.copytree(version, copied)
    return {
        "version": copied, "weights": copied, "image": folder / "image.jpg", "prompts": folder / "prompts.txt",
        "predictions": folder / "predictions", "table": folder / "table.csv", "val": folder / "table.csv",
        "config": folder / "config.yaml", "units": folder / "units.jsonl", "results": folder, "tree": folder,
        "dataset": shapes_tree / "dataset", "data": shapes_tree / "data", "checkpoint": folder,
    }  # fmt: skip


@pytest.mark.parametrize(("program", "name", "kind"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_a_wrong_path_is_one_message(program, name, kind, right, tmp_path, monkeypatch, capfd):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    wrong = spoil(tmp_path / f"wrong-{name}", kind)
    line, _ = LINES[program]
    new = {word: tmp_path / f"new-{word}.png" for word in ("output", "target", "folder")}
    argv = [word.format(**(new | right | {name: wrong})) for word in line.split()]
    if name not in ("version", "weights", "image"):  # the message comes before the long work
        monkeypatch.setattr(Self1EForSegmentation, "from_pretrained", lambda *args, **options: pytest.fail("loaded"))
    run = PROGRAMS.get(program.strip()) or (lambda argv: cli.main([program, *argv]))
    capfd.readouterr()
    try:
        code = run(argv)
    except SystemExit as stop:
        code = stop.code
    out, error = capfd.readouterr()
    assert code in (1, 2), f"{code}: {out}{error}"
    assert (f"wrong-{name}" in error + out or kind == "system" and "/proc" in error) and "Traceback" not in error
    assert "[Errno" not in error
    assert len(error.strip().splitlines()) < 12
