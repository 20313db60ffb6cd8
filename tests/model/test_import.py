"""`import self1e` in a process of its own."""

import subprocess
import sys


def test_import_needs_no_annotation_readers_and_no_posix_locks():
    """It works where cv2, pycocotools and fcntl cannot be imported, so it loads none of them."""
    code = (
        "import sys; sys.modules.update(cv2=None, pycocotools=None, fcntl=None); import self1e; print(self1e.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Self1EForSegmentation" in done.stdout, done.stderr
