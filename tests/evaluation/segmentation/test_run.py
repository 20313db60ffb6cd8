"""The evaluation loop on tiny real models and data: counts, ranks, files, errors, published scores."""

import json
import shutil
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from helpers import SHARED, files, needs_shared, read_json
from PIL import Image
from segmentation_trees import GREF, REASON, SECOND, TRAIN2014, evaluate

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.data.splits import DEFAULT_SPLITS, SPLITS, load_split
from self1e.errors import UserError
from self1e.evaluation.segmentation.metrics import PROTOCOLS, Unit, read_units, score
from self1e.evaluation.segmentation.report import draw_unit, summary_table
from self1e.evaluation.segmentation.run import evaluate_splits, evaluate_units, make_schedule, units_of
from self1e.model.inference import masks_of


def test_registry_is_complete():
    paper = Counter({"ReasonSeg": 2, "refcoco": 3, "refcoco+": 3, "refcocog": 2, "grefcoco": 3})
    assert Counter(name.split("|")[0] for name in DEFAULT_SPLITS) >= paper
    for split in SPLITS.values():
        assert split.protocol in PROTOCOLS
        assert all(len(figures) == len(split.headline) for figures in split.published.values())


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("sentences", [[1], [5, 1, 3], list(range(1, 40)), [16, 17, 60, 1, 1]])
def test_schedule_covers_every_photo_once_and_keeps_ranks_in_step(sentences, world):
    ranks = [make_schedule(dict(enumerate(sentences)), rank, world, 16) for rank in range(world)]
    counted = [visit.photo for visits in ranks for visit in visits if visit.counts]
    assert sorted(counted) == list(range(len(sentences)))
    for together in zip(*ranks, strict=True):
        assert len({visit.forwards for visit in together}) == 1
        assert all(visit.forwards * 16 >= sentences[visit.photo] for visit in together)


def test_units_equal_a_plain_forward_per_photo(tiny, dataset, tmp_path):
    model, processor = tiny
    split, before = load_split(GREF, dataset), torch.get_rng_state()
    options = {"workers": 1, "conversations_per_forward": 2}
    units = evaluate_units(model.eval(), processor, split, "rela", units_of(tmp_path, GREF, split), **options)
    assert torch.equal(before, torch.get_rng_state())  # training after it draws the same
    assert [unit.id for unit in units] == [name for photo in split for name in photo.unit_ids]
    assert sum(unit.no_target for unit in units) == 2
    expected = []
    for photo in split:
        image, targets = photo.load()
        batch = processor(images=[image], conversations=[[[prompt, "[SEG]."] for prompt in photo.prompts]])
        with torch.no_grad():
            out = model(**batch)
        for logits, target in zip(out.mask_logits, targets, strict=True):
            full = torch.nn.functional.interpolate(logits[None], target.shape, mode="bilinear", align_corners=False)
            mask = full[0, 0].numpy() > 0
            near = int((full.abs() < 1e-4).sum())  # other chunks, other summation: such pixels may flip
            expected.append((int((mask & (target == 1)).sum()), int((mask | (target == 1)).sum()), near))
    assert 0 < sum(I for I, _, _ in expected) < sum(U for _, U, _ in expected)
    for unit, (I, U, near) in zip(units, expected, strict=True):
        assert abs(unit.I - I) <= near and abs(unit.U - U) <= near, unit
    assert "What is right square in this image? Please output segmentation mask." in {unit.text for unit in units}


def test_files_table_and_pictures(tiny, dataset, tmp_path, capsys, monkeypatch):
    model, processor = tiny
    model.train()
    tiles: list[int] = []

    def watched(model, batch, *args, **kwargs):
        tiles.append(len(batch["pixel_values"]))
        return masks_of(model, batch, *args, **kwargs)

    monkeypatch.setattr("self1e.evaluation.segmentation.run.masks_of", watched)
    options = {"dataset_dir": dataset, "output_dir": tmp_path, "workers": 1, "visualize": True, "high_res": True,
               "model_max_length": 2048}  # fmt: skip
    results = evaluate_splits(model, processor, [REASON, GREF], **options)
    assert model.training
    assert max(tiles) > 1  # as high_res asks for
    for split, name in ((GREF, "grefcoco_unc_val"), (REASON, "ReasonSeg_val")):
        units = read_units(tmp_path / f"{name}.jsonl")
        written = read_json(tmp_path / f"{name}.json")
        data = {REASON: "2 of 200 images", GREF: "-"}[split]
        assert written == results[split] == {"split": split, "data": data, **score(units)}
        pictures = sorted(path.name for path in (tmp_path / name).glob("*.jpg"))
        assert len(pictures) == written["n"] and (tmp_path / name / "overview.png").exists()
        worst = min(units, key=lambda unit: unit.iou)
        assert pictures[0].startswith(f"0001_iou{worst.iou:.2f}_")
    assert results[REASON]["protocol"] == "reasonseg" and results[REASON]["long"]["n"] == 1
    assert results[GREF]["rela"]["n_no_target"] == 2
    table = (tmp_path / "summary.md").read_text()
    printed = capsys.readouterr().out
    assert table == summary_table(results) and table in printed and str(tmp_path / "summary.md") in printed
    assert "59.4" not in table and "N-acc" in table and "ReasonSeg val (2 of 200 images)" in table
    assert read_json(tmp_path / "summary.json") == results and not list(tmp_path.glob(".*"))


def test_a_picture_marks_truth_and_prediction(dataset):
    photo = load_split(REASON, dataset)[0]
    unit = Unit(id="a", image="a", text="a", I=0, U=1, target_pixels=1, predicted_pixels=0)
    targets = photo.load()[1]
    purple = Image.new("RGB", targets.shape[:0:-1], (140, 60, 200))
    drawn = [draw_unit(replace(photo, load=lambda x=x: (purple, x)), 0, unit) for x in (targets, 0 * targets)]
    green = [any(g > 1.2 * r and g > 1.2 * b for _, (r, g, b) in p.getcolors(2**24)) for p in drawn]
    assert drawn[0].size == drawn[1].size and green == [True, False]  # green outlines the ground truth


def test_absent_data_is_listed_or_skipped_and_nothing_at_all_is_an_error(tiny, dataset, tmp_path, capsys):
    splits = [REASON, "refcoco|unc|val", "refcocog|umd|test"]
    with pytest.raises((UserError, FileNotFoundError), match=r"(?s)refcoco\|unc\|val.*refcocog\|umd\|test"):
        evaluate_splits(*tiny, splits, dataset_dir=dataset, output_dir=tmp_path / "a")
    options = {"dataset_dir": dataset, "output_dir": tmp_path / "b", "workers": 0, "skip_missing": True}
    assert list(evaluate_splits(*tiny, splits, **options)) == [REASON]
    assert "refcoco|unc|val, refcocog|umd|test" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"nothing was evaluated.*{dataset}"):
        evaluate_splits(*tiny, splits[1:], **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_photo_stops_with_its_name_and_keeps_what_is_written(tiny, dataset, tmp_path, workers):
    shutil.copytree(dataset, tmp_path / "broken")
    photo = tmp_path / "broken" / TRAIN2014 / SECOND
    photo.write_bytes(photo.read_bytes()[:400])
    with pytest.raises(UserError, match=SECOND):
        evaluate_splits(
            *tiny, [REASON, GREF], dataset_dir=tmp_path / "broken", output_dir=tmp_path / "out", workers=workers
        )
    assert list(read_json(tmp_path / "out/summary.json")) == [REASON]
    assert {path.name for path in (tmp_path / "out").glob("grefcoco*")} == {"grefcoco_unc_val.rank0.jsonl"}


def test_a_sentence_that_does_not_fit_is_named(tiny, dataset, tmp_path):
    with pytest.raises(UserError, match=r"COCO_train2014_0+1\.jpg.*--model_max_length"):
        evaluate_splits(*tiny, [GREF], dataset_dir=dataset, output_dir=tmp_path, workers=0, model_max_length=45)


def test_two_processes_write_what_one_writes(tiny, tiny_version, dataset, tmp_path, one_thread):
    options = {"workers": 1, "conversations_per_forward": 2, "visualize": True, "weights": {"weights": "tiny"}}
    evaluate_splits(*tiny, [GREF, REASON], dataset_dir=dataset, output_dir=tmp_path / "1", **options)
    done = evaluate(tmp_path, 2, tiny_version, dataset, tmp_path / "2", "none", GREF, REASON)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (files(tmp_path / part) for part in "12")
    assert {"settings.json", "summary.json", "summary.md"} < one.keys() and one == two
    for name, units in (("grefcoco_unc_val", 9), ("ReasonSeg_val", 2)):
        assert {f"{name}.json", f"{name}.jsonl", f"{name}/overview.png"} < one.keys()
        assert sum(path.startswith(f"{name}/") and "_iou" in path for path in one) == units


@needs_shared
def test_published_scores_unit_by_unit(tmp_path):
    """I and U of the published evaluation; they may differ by the pixels whose logit is within 1e-4 of 0."""
    base, weights = SHARED / "golden/model/base_internvl_chat", SHARED / "golden/model/trained_self1e"
    model = Self1EForSegmentation.from_pretrained(base, weights=weights, dtype=torch.float32)
    processor = Self1EProcessor.from_pretrained(base)
    golden = json.loads((SHARED / "golden/eval_scores.json").read_text(encoding="utf-8"))
    data = SHARED / "minidata/dataset"
    results = evaluate_splits(model, processor, golden, dataset_dir=data, output_dir=tmp_path, workers=1)
    for split, scores in golden.items():
        expected = defaultdict(list)
        for unit in scores["units"]:
            expected[unit["image"], unit["text"]].append(unit)
        units = read_units(tmp_path / f"{split.replace('|', '_')}.jsonl")
        assert len(units) == results[split]["n"] == scores["n"], split
        slack = 0.0
        for unit in units:
            candidates = expected[unit.image, unit.text]
            assert candidates, f"{split}: {unit.image} {unit.text!r} is not among the published units"
            match = min(candidates, key=lambda other: abs(other["I"] - unit.I) + abs(other["U"] - unit.U))
            candidates.remove(match)
            near = match["pixels_near_threshold"]
            assert abs(unit.I - match["I"]) <= near and abs(unit.U - match["U"]) <= near, (split, unit, match)
            slack += 2 * near / max(match["U"], 1)
        assert results[split]["giou"] == pytest.approx(scores["giou"], abs=slack / len(units) + 1e-9)
        assert results[split]["ciou"] == pytest.approx(scores["ciou"], abs=slack / len(units) + 1e-9)
