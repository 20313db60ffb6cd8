"""What tells checkpoints and settings apart."""

import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import SoftFileLock

from self1e.evaluation import provenance
from self1e.evaluation.provenance import SettingsFile, checkpoint_settings, describe, fingerprint
from self1e.files import write_json

CPU = torch.device("cpu")


def test_fingerprint_follows_content_not_place(tmp_path):
    content = bytes(range(256)) * 4000
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert fingerprint(tmp_path / "a") == fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes(len(content)))
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert checkpoint_settings("OpenGVLab/InternVL3-2B", None) == {
        "version": "OpenGVLab/InternVL3-2B",
        "weights": None,
    }


def test_equal_settings_pass_and_each_difference_is_named(tmp_path):
    file, settings = SettingsFile(tmp_path), describe({"dtype": "float32", "high_res": False}, CPU)
    assert torch.__version__.startswith(settings["figures"]["packages"]["torch"])
    assert settings["run"]["devices"] and settings["run"]["processes"] == 1
    assert settings["run"]["command"] == shlex.join(sys.orig_argv)
    with pytest.raises(ValueError, match="nobody wrote down"):
        file.check("a|val", settings)
    file.record("a|val", settings)
    file.record("b|val", describe({"dtype": "bfloat16"}, CPU))
    file.check("a|val", describe({"dtype": "float32", "high_res": False}, CPU))  # another start, the same figures
    other = describe({"dtype": "float32", "high_res": True}, CPU)
    other["figures"]["packages"] = {**other["figures"]["packages"], "torch": "9.0"}
    with pytest.raises(ValueError, match="a|val.*high_res was false and is true") as refused:
        file.check("a|val", other)
    message = str(refused.value)
    assert '"torch": "9.0"' in message and "numpy" not in message  # of a table only what differs
    assert "--exp_name" in message and "--overwrite_eval" in message


def test_evaluations_in_one_folder_lose_no_settings_of_each_other(tmp_path, monkeypatch):
    """Such as the jobs of a queue, one per split."""

    def slowly(path, value):
        time.sleep(0.05)
        write_json(path, value)

    monkeypatch.setattr(provenance, "write_json", slowly)
    names = [f"{split}|val" for split in "abcd"]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: SettingsFile(tmp_path).record(name, {"figures": {}}), names))
    assert sorted(SettingsFile(tmp_path).read()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_lock_that_nobody_lifts_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "LOCKED", 0)
    with SoftFileLock(tmp_path / ".settings.json.lock"), pytest.raises(OSError, match=r"settings\.json\.lock is left"):
        SettingsFile(tmp_path).record("a|val", {"figures": {}})


def test_edited_code_is_another_setting_and_a_comment_is_none(tmp_path, monkeypatch):
    for room in ("model", "data"):
        shutil.copytree(provenance.PACKAGE / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    before, head = provenance.code(), tmp_path / "model" / "head.py"
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    head.write_text("# a remark\n" + head.read_text())
    assert provenance.code() == before
    head.write_text(head.read_text().replace("INITIAL_STD = 0.02", "INITIAL_STD = 0.03"))
    assert provenance.code() != before


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_settings_file_is_named(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match="settings.json"):
        SettingsFile(tmp_path).read()
