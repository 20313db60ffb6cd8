"""A data worker that never returns ends the run by name."""

import os
import re
import subprocess
import sys

import psutil
import pytest
from helpers import ROOT
from runs import command

PHOTOS = {
    "training": "dataset/refer_seg/images/mscoco/images/train2014",
    "validation": "dataset/reason_seg/ReasonSeg/val",
}


@pytest.mark.parametrize("where", PHOTOS)
def test_a_data_worker_that_hangs_is_named(tiny_version, damaged, tmp_path, where):
    """A named pipe in the place of a photo: whoever opens it waits for a writer that never comes."""
    photo = sorted((damaged / PHOTOS[where]).glob("*.jpg"))[0]
    photo.unlink()
    os.mkfifo(photo)
    flags = ["--dataset", "refer_seg", "--refer_seg_data", "refcoco", "--max_steps", "500", "--save_steps", "500"]
    flags += ["--workers", "1", "--timeout", "12", "--report_to", "none", "--eval_steps", "1"]
    flags += ["--no_eval"] if where == "training" else []
    program = [sys.executable, str(ROOT / "train_hf_ivl_seq.py")]
    done = subprocess.run(
        [*program, *command(tiny_version, damaged, tmp_path, "hangs", *flags)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    message = done.stderr[done.stderr.index("error: nothing has moved for 12 seconds (--timeout)") :]
    if where == "training":
        expected = r"rank 0 reads the samples that come after .*refcoco/COCO_train2014_\d+\.jpg"
        assert re.search(expected, message), message
    else:
        assert f"rank 0 reads ReasonSeg|val {photo.name}" in message, message
    left = [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(each.info["cmdline"] or [])]
    assert not left, "a worker outlives its run"
