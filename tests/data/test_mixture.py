"""self1e/data/mixture.py and the registry: rates, plans, modes, broken samples, exclusion, missing data."""

import logging
from collections import Counter
from functools import partial

import numpy as np
import pytest
from streams import Numbers, epoch_batches, ids
from torch.utils.data import DataLoader
from trees import SQUARE, instances, label_map, photo, questions, reasoning_photo, reference, referring_set, write_json

from self1e.data.families import FAMILIES, select
from self1e.data.mixture import Mixture
from self1e.data.sets.vqa import QUESTIONS
from self1e.data.splits import evaluation_keys, load_split
from self1e.errors import UserError


def toy(mode="exact", batch_size=4, seg=30, text=50, rates=(1, 1), broken=(), seed=0, redraw=False):
    groups = [
        ([Numbers("seg", seg, broken, redrawn=redraw), Numbers("seg2", 5, redrawn=redraw)], rates[0]),
        ([Numbers("text", text, segmentation=False, redrawn=redraw)], rates[1]),
    ]
    return Mixture(groups, batch_size=batch_size, seed=seed, mode=mode)


def is_seg(mixture, slot):
    return mixture.sets[slot[1]].data.segmentation


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("mode", ["exact", "published"])
def test_plans_are_even_over_ranks(world, batch_size, mode):
    mixture = toy(mode, batch_size)
    batches = epoch_batches(mixture, world)
    sizes = {len(batch) for batch in batches}
    assert len(batches) == world * -(-85 // (batch_size * world))
    assert max(sizes) - min(sizes) <= 1 and 1 <= min(sizes) and max(sizes) <= batch_size
    assert sum(map(len, batches)) == (85 if batch_size > 1 else -(-85 // world) * world)


def test_exact_holds_every_place_once_and_spreads_segmentation():
    mixture = toy("exact", 4, seg=10, text=70, rates=(1, 1))  # 15 of 85 slots, 22 micro-batches
    batches = epoch_batches(mixture)
    slots = np.concatenate(batches)
    assert len(np.unique(slots, axis=0)) == 85 and len(set(ids(mixture, slots))) == 85
    assert sum(any(is_seg(mixture, t) for t in batch) for batch in batches) == 15
    mixture = toy("exact", 4, seg=30, text=50)  # 35 slots: every micro-batch has one
    assert all(any(is_seg(mixture, t) for t in batch) for batch in epoch_batches(mixture))


def test_published_gives_the_last_place_to_segmentation():
    mixture = toy("published", 4, seg=30, text=500, rates=(2, 1))
    batches = epoch_batches(mixture)
    assert all(is_seg(mixture, batch[-1]) for batch in batches)
    others = np.concatenate([batch[:-1] for batch in batches])
    assert len(np.unique(others, axis=0)) == len(others)  # a shuffle: nothing twice but the last slots
    lasts = Counter(ids(mixture, [batch[-1] for batch in batches]))
    assert len(lasts) > 25 and max(lasts.values()) < len(batches) / 4
    slots = np.concatenate(batches)
    assert len(np.unique(slots, axis=0)) == len(slots)  # an item met twice is drawn anew


def test_no_constraint_at_batch_size_one_or_without_segmentation():
    mixture = toy("published", 1)
    slots = np.concatenate(epoch_batches(mixture))
    assert len(set(ids(mixture, slots))) == 85
    mixture = Mixture([([Numbers("text", 9, segmentation=False)], 1)], batch_size=4, seed=0)
    assert sorted(ids(mixture, np.concatenate(epoch_batches(mixture)))) == [f"text/{k}" for k in range(9)]


def test_redrawn_sets_draw_with_replacement_in_published_mode_only():
    for mode, repeated in ("exact", False), ("published", True):
        mixture = toy(mode, 1, seg=200, text=200, redraw=True)
        counts = Counter(ids(mixture, np.concatenate(epoch_batches(mixture))))
        assert (max(counts.values()) > 1) is repeated and sum(counts.values()) == 405


def test_rates_multiply_and_take_shares():
    mixture = toy(rates=(2.5, 0.5), batch_size=1)  # 35 and 50 samples
    assert mixture.epoch_size == 2 * 35 + 18 + 25
    shares = []
    for epoch in (0, 0, 1):
        counts = Counter(ids(mixture, np.concatenate(epoch_batches(mixture, epoch=epoch))))
        assert Counter(v for k, v in counts.items() if k.startswith("seg")) == {2: 17, 3: 18}
        assert Counter(v for k, v in counts.items() if k.startswith("text")) == {1: 25}
        shares.append(frozenset(k for k in counts if k.startswith("text")))
    assert shares[0] == shares[1] != shares[2]


def test_samples_are_a_function_of_seed_and_token():
    slots = np.concatenate(epoch_batches(toy()))
    again = np.concatenate(epoch_batches(toy()))
    assert (slots == again).all()

    def first(mixture):
        return [mixture[t].conversations for t in slots[:10]]

    assert first(toy()) == first(toy()) != first(toy(seed=1))
    assert toy()[slots[3]].conversations == toy()[tuple(slots[3])].conversations
    next_epoch = np.concatenate(epoch_batches(toy(), epoch=1))
    assert ids(toy(), slots) != ids(toy(), next_epoch)
    assert toy()[0, 0, 3, 0].conversations != toy()[0, 0, 3, 1].conversations
    assert toy()[0, 0, 3, 0].conversations != toy()[1, 0, 3, 0].conversations


def test_broken_samples_are_replaced_logged_and_listed(caplog):
    mixture = toy(broken=range(1, 30))  # seg: only item 0 is whole
    slot = (0, 0, 7, 0)
    with caplog.at_level(logging.WARNING):
        sample = mixture[slot]
    assert sample.id == "seg/0" or sample.id.startswith("seg2/")
    assert sample.replaced[0] == "seg/7: torn" and len(sample.replaced) <= 20
    logged = [record.getMessage() for record in caplog.records]
    assert toy(broken=range(1, 30))[slot].replaced == sample.replaced
    assert len(logged) == len(sample.replaced) and all(broken in text for broken, text in zip(sample.replaced, logged))


def test_a_broken_kind_falls_back_to_its_own_kind_then_stops():
    mixture = toy(broken=range(30))
    assert {mixture[0, 0, item, 0].id.split("/")[0] for item in range(10)} == {"seg2"}

    def refuse(sample):
        raise UserError(f"{sample.id}: too long after {len(sample.replaced)}")

    with pytest.raises(UserError, match="21 samples tried.*\n.*text/4: too long after 0\ntext/.*after 1") as error:
        toy().build((0, 2, 4, 0), refuse)
    assert str(error.value).count("\n") == 21


def test_a_sample_without_a_usable_label_is_served_by_the_next():
    mixture = Mixture([([Numbers("a", 5, empty=(1, 2, 4))], 1)], batch_size=1, seed=0)
    assert [mixture[0, 0, item, 0].id for item in range(5)] == ["a/0", "a/3", "a/3", "a/3", "a/0"]
    empty = Mixture([([Numbers("a", 2, empty=(0, 1))], 1)], batch_size=1, seed=0)
    with pytest.raises(UserError, match="no image of this set has a usable label"):
        empty[0, 0, 0, 0]


def test_a_fault_of_a_sets_code_is_no_broken_sample():
    class Edited(Numbers):
        def read(self, index, rng):
            return self.typo

    with pytest.raises(AttributeError, match="typo"):
        Mixture([([Edited("a", 5)], 1)], batch_size=1, seed=0)[0, 0, 0, 0]


def test_contradictions_are_said_once_per_kind(tmp_path, caplog):
    far = [{"id": n, "image_id": 7, "segmentation": [SQUARE], "bbox": [90, 90, 5, 5]} for n in (1, 2)]
    referring_set(tmp_path, "refcoco", [reference(1, 7, 1, "train", "it")], far)
    build(tmp_path, dataset="refer_seg", refer_seg_data="refcoco")
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(": ")[1] for text in said] == ["2 x segmentation far from its bbox (first"]


@pytest.mark.parametrize("token", ["[SEG]", "[SEGT]", "<image>", "<img>", "<IMG>", "<|im_end|>", "\ud800"])
def test_control_tokens_in_texts_break_a_sample_and_an_evaluated_photo(tmp_path, token):
    """Also those that come about when a phrase is lower-cased."""
    text = f"a {token} b"
    square = [{"id": 1, "image_id": 7, "segmentation": [SQUARE]}]
    referring_set(tmp_path, "refcoco", [reference(1, 7, 1, s, text) for s in ("train", "val")], square)
    mixture = build(tmp_path, dataset="refer_seg", refer_seg_data="refcoco")
    if token in ("[SEG]", "[SEGT]"):
        assert text.lower() in mixture[0, 0, 0, 0].conversations[0][0]
        return
    with pytest.raises(UserError, match="reserved token|no Unicode"):
        mixture[0, 0, 0, 0]
    with pytest.raises(UserError, match=r"\.jpg: .*(reserved token|no Unicode)"):
        load_split("refcoco|unc|val", tmp_path)[0]


def tree(root):
    """A tree with one or two samples a set; photo 7 is in every COCO-named set, and in refcoco's val."""
    for stem in "a", "b":
        photo(root / f"ade20k/images/training/{stem}.jpg")
        label_map(root / f"ade20k/annotations/training/{stem}.png", [1, 2])
    for number in 7, 8:
        photo(root / f"coco/train2017/{number:012d}.jpg")
        label_map(root / f"cocostuff/train2017/{number:012d}.png", [0, 1])
    square = {"id": 1, "image_id": 7, "segmentation": [SQUARE]}
    paco = root / "vlpart/paco/annotations/paco_lvis_v1_train.json"
    write_json(paco, instances([(7, f"train2017/{7:012d}.jpg")], [square]))
    write_json(root / "vlpart/pascal_part/train.json", instances([(7, "x.jpg")], [square]))
    photo(root / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/x.jpg")
    for name in FAMILIES["refer_seg"]:
        refs = [reference(1, 7, 1, "train", "a"), reference(2, 9, 1, "train", "b")]
        refs += [reference(3, 7, 1, "val", "c")] if name in ("refcoco", "refclef") else []
        referring_set(root, name, refs, [square])
    for split in "train", "val", "test":
        reasoning_photo(root, split, split, ["x"])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    conversations = [{"id": str(n), "image": f"{n:012d}.jpg", "conversations": turns} for n in (7, 8)]
    write_json(root / "llava_dataset/llava_instruct_150k.json", conversations)
    for name, file in QUESTIONS.items():
        questions(root / "data", file, 2, folder=f"{name}/photos")
    return root


def build(root, *, seed=0, mode="published", excluded=None, **flags):
    selection = select(dataset_dir=root, data_dir=root / "data", **flags)
    return Mixture(selection, batch_size=3, seed=seed, mode=mode, excluded=excluded)


FROM_VQA = ("llava_instruct_150k", "vqav2", "okvqa", "textvqa", "vizwiz", "gqa")
ALL = {"ade20k": 2, "cocostuff": 2, "pascal_part": 1, "paco_lvis": 1}
ALL |= {"refclef": 2, "refcoco": 2, "refcoco+": 2, "refcocog": 2, "ReasonSeg": 1} | dict.fromkeys(FROM_VQA, 2)


def describe(samples):
    return [(each.id, each.conversations, [mask.tobytes() for mask in each.masks], each.replaced) for each in samples]


def test_every_set_is_mixed_and_workers_and_resuming_change_nothing(tmp_path):
    mixture = build(tree(tmp_path))
    assert mixture.sizes == ALL and mixture.epoch_size == sum(ALL.values())
    batches = mixture.micro_batches(3, rank=0, world_size=1)
    here = [describe(mixture[slot] for slot in batch) for batch in batches]
    load = partial(DataLoader, mixture, collate_fn=describe)
    for workers in 0, 2:
        assert list(load(batch_sampler=batches, num_workers=workers)) == here
    resumed = build(tmp_path).micro_batches(3, rank=0, world_size=1)[4:]
    assert list(load(batch_sampler=resumed)) == here[4:]


def test_rates_go_with_names_and_spare_the_question_sets(tmp_path):
    root = tree(tmp_path)
    assert build(root, dataset="vqa||reason_seg", sample_rates="5,7").epoch_size == 5 * 2 + 5 * 2 + 7 * 1
    assert build(root, dataset="reason_seg||vqa", sample_rates="5,7").epoch_size == 5 * 1 + 7 * 2 + 5 * 2
    assert build(root, dataset="refer_seg", sample_rates="0.5", refer_seg_data="grefcoco||refcoco").epoch_size == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"sample_rates": "1,1"}, ["--sample_rates", "4 numbers", "sem_seg, refer_seg, reason_seg, vqa"]),
        ({"sample_rates": "1,1,1,-1"}, ["--sample_rates"]),
        ({"sample_rates": "1,1,1,x"}, ["--sample_rates"]),
        ({"sample_rates": "1,1,1,nan"}, ["--sample_rates"]),
        ({"dataset": "sem_seg||video"}, ["--dataset", "'video'", "refer_seg"]),
        ({"sem_seg_data": "ade"}, ["--sem_seg_data", "'ade'", "mapillary"]),
        ({"refer_seg_data": "refcoco++"}, ["--refer_seg_data", "grefcoco"]),
        ({"reason_seg_data": "ReasonSeg|dev"}, ["unknown ReasonSeg split 'dev'", "train"]),
        ({"vqa_data": ""}, ["--vqa_data", "gqa"]),
        ({"explanatory": 3}, ["--explanatory"]),
    ],
)
def test_bad_flags_are_named(tmp_path, arguments, words):
    with pytest.raises(UserError) as error:
        build(tree(tmp_path), **arguments)
    assert all(word in str(error.value) for word in words)


def test_excluded_photos_are_matched_across_sets(tmp_path):
    root = tree(tmp_path)
    plain = build(root, reason_seg_data="ReasonSeg|train_val").sizes
    strict = build(root, reason_seg_data="ReasonSeg|train_val", excluded=evaluation_keys(root))
    # COCO photo 7 (refcoco's val) leaves every COCO set, 7/images/7.jpg refclef, val.jpg ReasonSeg.
    dropped = {name: plain[name] - strict.sizes[name] for name in plain if plain[name] != strict.sizes[name]}
    coco = ("cocostuff", "paco_lvis", "refcoco", "refcoco+", "refcocog", "llava_instruct_150k", "refclef", "ReasonSeg")
    assert dropped == dict.fromkeys(coco, 1)
    slots = np.concatenate(strict.micro_batches(0, rank=0, world_size=1))
    assert not [id for id in (strict[t].id for t in slots) if f"{7:012d}" in id or id.endswith(("/7.jpg", "val.jpg"))]


@pytest.mark.parametrize("mode", ["published", "exact"])
def test_the_miniature_sets_mix(miniature, mode):
    selection = select(
        dataset_dir=miniature / "dataset",
        data_dir=miniature / "data",
        sample_rates="2,1,3,0.5",
        explanatory=0.3,
        refer_seg_data="refclef||refcoco||refcoco+||refcocog||grefcoco",
        sem_seg_data="ade20k||cocostuff||pascal_part||paco_lvis||mapillary",
    )
    mixture = Mixture(selection, batch_size=5, seed=1, mode=mode)
    for batch in epoch_batches(mixture, world=2, epoch=2):
        for sample in map(mixture.__getitem__, batch):
            assert not sample.replaced and len(sample.conversations) == len(sample.masks) <= 3
            for row, mask in zip(sample.conversations, sample.masks):
                assert row[0].startswith("<image>\n") and mask.dtype == np.uint8 and mask.max(initial=0) <= 1
                assert len(mask) == "".join(row[1::2]).count("[SEG]")
                assert mask.shape[1:] == (sample.image.height, sample.image.width)
