"""What a user reads when data is absent."""

import re

import pytest
from helpers import ROOT

from self1e.data.families import FAMILIES, DataConfig
from self1e.data.paths import UNFETCHED, require_paths
from self1e.data.splits import PREFIXES, SPLITS, split_paths


def told(wanted) -> list[str]:
    with pytest.raises(FileNotFoundError) as error:
        require_paths(wanted)
    return str(error.value).splitlines()


def test_a_missing_folder_is_one_line_with_the_command_that_fills_it(tmp_path):
    config = DataConfig.parse(
        dataset_dir=tmp_path / "absent", data_dir=tmp_path / "data", dataset="sem_seg||refer_seg"
    )
    first, *lines = told(config.paths() + split_paths(["refcoco|unc|val", "refzom|final|test"], tmp_path / "absent"))
    assert "get_data.sh ade20k cocostuff paco_lvis pascal_part refclef refcoco refcoco+ refcocog" in first
    assert len(lines) == 1 and lines[0].startswith(f"  {tmp_path / 'absent'}   (the folder is missing: ")
    assert lines[0].endswith("files and folders of 10 sets)")


def test_few_missing_paths_are_named_one_by_one(tmp_path):
    (tmp_path / "tree").mkdir()
    wanted = [("gqa", tmp_path / "tree/gqa/a"), ("gqa", tmp_path / "tree/gqa/b"), ("vqav2", tmp_path / "tree/gqa/b")]
    assert told(wanted)[1:] == [f"  {tmp_path}/tree/gqa/a   (gqa)", f"  {tmp_path}/tree/gqa/b   (gqa, vqav2)"]
    assert "get_data" not in told([("custom", tmp_path / "mine.csv")])[0]  # it brings nobody's own data


def test_every_set_is_one_that_can_be_fetched_or_not():
    names = {name for family in FAMILIES.values() for name in family.sets} | {name.split("|")[0] for name in SPLITS}
    names |= {prefix.rstrip("|") for prefix in PREFIXES}
    cases = re.findall(r"^        ([\w+| -]+)\)", (ROOT / "scripts/get_data.sh").read_text(), re.MULTILINE)
    assert names - {name for case in cases for name in case.split(" | ")} == set(UNFETCHED)
