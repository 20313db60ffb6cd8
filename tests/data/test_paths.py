"""Files of data sets: what a user reads when some are absent, and which ones annotations may name."""

import unicodedata
from types import SimpleNamespace

import pytest
from trees import SQUARE, photo, reference, referring_set

from self1e.data.families import select
from self1e.data.mixture import Mixture
from self1e.data.samples import inside, list_names, require_paths
from self1e.data.splits import load_split
from self1e.errors import UserError


def test_missing_paths_are_one_error_that_names_each_once(tmp_path):
    def needs(name, *paths):
        return SimpleNamespace(name=name, paths=lambda: [tmp_path / path for path in paths])

    with pytest.raises(UserError) as error:
        require_paths([needs("gqa", "a"), needs("vqav2", "b"), needs("gqa", "b", "b"), needs("x", ".")])
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 2 and f"{tmp_path}/a " in lines[0] and f"{tmp_path}/b   (vqav2, gqa)" in lines[1]
    require_paths([needs("x", ".")])


def test_hidden_files_are_not_listed(tmp_path):
    for name in "b.jpg", "a.jpg", "._a.jpg", ".jpg", "c.json":
        (tmp_path / name).touch()
    assert list_names(tmp_path, ".jpg") == ["a.jpg", "b.jpg"]


def test_names_stay_in_their_folder(tmp_path):
    folder, outside = tmp_path / "photos", tmp_path / "outside"
    (folder / "a/b/c").mkdir(parents=True)
    outside.mkdir()
    (outside / "x.jpg").touch()
    assert inside(folder, "a/b/c/x.jpg") == folder / "a/b/c/x.jpg"
    for name in "../outside/x.jpg", "a/../../outside/x.jpg", f"{outside}/x.jpg", "C:\\x.jpg", "a\\..\\..\\x.jpg", "\0":
        with pytest.raises(UserError, match="leads out of .*photos.*--allow_outside"):
            inside(folder, name)
    for name in "../outside/x.jpg", f"{outside}/x.jpg":
        assert inside(folder, name, allow_outside=True).samefile(outside / "x.jpg")
    (folder / "link.jpg").symlink_to(outside / "x.jpg")  # users link photos and folders of photos
    assert inside(folder, "link.jpg").exists()


def test_accents_are_found_in_either_form_and_what_can_be_no_name_is_named(tmp_path):
    for form, other in ("NFC", "NFD"), ("NFD", "NFC"):
        (tmp_path / form).mkdir()
        (tmp_path / form / unicodedata.normalize(form, "Küche.jpg")).touch()
        assert inside(tmp_path / form, unicodedata.normalize(other, "Küche.jpg")).exists()
    with pytest.raises(UserError, match="backslashes"):
        inside(tmp_path, "a\\b.jpg")
    for name in "x" * 300, "a/" + "é" * 150:
        with pytest.raises(UserError, match="more than 255 bytes"):
            inside(tmp_path, name)


def test_a_set_and_a_split_refuse_a_photo_outside_unless_allowed(tmp_path):
    square = [{"id": 1, "image_id": 7, "segmentation": [SQUARE]}]
    refs = [reference(1, 7, 1, "train", "x"), reference(2, 7, 1, "val", "x")]
    referring_set(tmp_path / "tree", "refcoco", refs, square, images=[(7, "../" * 5 + "secret.jpg")])
    (tmp_path / "tree/refer_seg/images/mscoco/images/train2014").mkdir(parents=True, exist_ok=True)
    photo(tmp_path / "secret.jpg")
    with pytest.raises(UserError, match="secret.jpg.*leads out of"):
        load_split("refcoco|unc|val", tmp_path / "tree")[0].load()
    assert load_split("refcoco|unc|val", tmp_path / "tree", allow_outside=True)[0].load()[1].sum() == 36
    flags = {"dataset": "refer_seg", "refer_seg_data": "refcoco"}
    for allowed in False, True:
        selection = select(dataset_dir=tmp_path / "tree", data_dir=tmp_path, allow_outside=allowed, **flags)
        mixture = Mixture(selection, batch_size=1, seed=0)
        slot = mixture.micro_batches(0, rank=0, world_size=1)[0][0]
        if allowed:
            assert mixture[slot].masks[0].sum() == 36
        else:
            with pytest.raises(UserError, match="leads out of"):
                mixture[slot]
