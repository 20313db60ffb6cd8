"""The plugin of lmms-eval: against the package where it is installed, else against a stand-in for its interface.

The stand-in has what lmms-eval 0.7.3 offers to a model. The tasks and the command line need the package itself.
"""

import abc
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, make_base, noise
from segmentation_trees import GREF, REASON, make_dataset
from test_project import PROJECT

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.data.masks import decode_segmentation, encode_mask
from self1e.data.splits import DEFAULT_SPLITS, file_stem
from self1e.evaluation.segmentation.run import evaluate_splits
from self1e.evaluation.vqa.generation import generate_replies

TASKS = ROOT / "self1e/apps/lmms_eval/tasks"
needs_package = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


class Base(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    rank = property(lambda self: self._rank)

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


class Messages:
    def __init__(self, messages):
        self.messages = [
            SimpleNamespace(role=m["role"], content=[SimpleNamespace(**p, model_dump=p.copy) for p in m["content"]])
            for m in messages
        ]

    def extract_media(self):
        parts = [part for message in self.messages for part in message.content]
        return tuple([part.url for part in parts if part.type == kind] for kind in ("image", "video", "audio"))


@dataclasses.dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def chat_class(monkeypatch):
    """The class that lmms-eval finds through the entry point in `pyproject.toml`."""
    if find_spec("lmms_eval") is None:
        offers: dict[str, dict[str, object]] = {"": {}, ".api": {}, ".models": {}}
        offers |= {".api.model": {"lmms": Base}, ".api.instance": {"Instance": object}}
        offers |= {".protocol": {"ChatMessages": Messages}, ".models.registry_v2": {"ModelManifest": Manifest}}
        for name, content in offers.items():
            module = ModuleType(f"lmms_eval{name}")
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delitem(sys.modules, "self1e.apps.lmms_eval.model", raising=False)
    (payload,) = PROJECT["entry-points"]["lmms_eval.models"].values()
    module, _, function = payload.partition(":")
    manifest = getattr(importlib.import_module(module), function)()
    assert manifest.model_id == "self1e"
    module, _, name = manifest.chat_class_path.rpartition(".")
    yield getattr(importlib.import_module(module), name)
    sys.modules.pop("self1e.apps.lmms_eval.model", None)  # it would keep the stand-in


def request(document: int, options: dict):
    """What lmms-eval hands to a chat model for one document: six items."""

    def messages(doc):
        media = [{"type": kind, "url": url} for kind, url in doc["media"]]
        return [{"role": doc.get("role", "user"), "content": [*media, {"type": "text", "text": doc["text"]}]}]

    return SimpleNamespace(args=("unused", messages, dict(options), document, "task", "test"))


def model_with(chat_class, version, documents, **options):
    model = chat_class(str(version), device="cpu", **options)
    model.task_dict["task"] = {"test": documents}
    return model


def test_replies_are_those_of_the_questions_alone_in_the_order_of_the_requests(chat_class, version):
    photos = noise(90, 60, 1), noise(70, 80, 2)
    texts = ["What is it?", "Where?", "How many are there?", "Why?", "Who took the picture of it?"]
    documents = [{"media": [("image", photos[n % 2])], "text": text} for n, text in enumerate(texts)]
    lengths = [6, 9, 6, 9, 6]  # a batch holds requests of one length only
    requests = [request(n, {"max_new_tokens": length, "until": ["\n\n"]}) for n, length in enumerate(lengths)]
    assert chat_class.is_simple is False
    found = model_with(chat_class, version, documents, batch_size="2", max_tiles=2).generate_until(requests)

    processor, model = Self1EProcessor.from_pretrained(version), Self1EForSegmentation.from_pretrained(version)
    for n, text in enumerate(texts):
        rows = [[[f"<image>\n{text}"]]]
        batch = dict(processor([photos[n % 2]], rows, padding_side="left", max_tiles=2, thumbnail=True))
        del batch["labels"]
        assert found[n : n + 1] == generate_replies(model, processor.tokenizer, batch, lengths[n])
    assert len(set(found)) > 1


def test_a_task_may_ask_for_masks(chat_class, version):
    photos = noise(90, 60, 1), noise(70, 80, 2)
    asked = [(0, "the ball"), (1, "the cup"), (0, "the hat")]
    documents = [
        {"media": [("image", photos[n])], "text": f" What is {phrase} in this image? Please output segmentation mask."}
        for n, phrase in asked
    ]
    requests = [request(n, {"segment": True}) for n in range(3)]
    found = model_with(chat_class, version, documents, batch_size=3).generate_until(requests)
    processor, model = Self1EProcessor.from_pretrained(version), Self1EForSegmentation.from_pretrained(version)
    for (n, phrase), reply in zip(asked, found):
        (rle,) = json.loads(reply)["masks"]
        expected = model.segment(processor, photos[n], phrase)[0].mask
        assert rle["size"] == [photos[n].height, photos[n].width]
        assert np.array_equal(decode_segmentation(rle, *rle["size"]) > 0, expected)


def test_what_the_model_cannot_do_is_named(chat_class, version, tmp_path):
    photo = ("image", noise(60, 60))
    documents = [
        {"media": [photo, photo], "text": "Which is larger?"},
        {"media": [("video", "a.mp4")], "text": "What happens?"},
        {"media": [photo], "text": "Is [SEG] a word?"},
        {"media": [photo], "text": "You are a cat.", "role": "system"},
        {"media": [photo], "text": "the ball"},
    ]
    model = model_with(chat_class, version, documents)
    wrong = ["document 0: 2 pictures, 0 videos", "document 1: 0 pictures, 1 videos", r"\[SEG\]", "the roles are"]
    for number, message in enumerate(wrong):
        with pytest.raises(ValueError, match=message):
            model.generate_until([request(number, {})])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until only"):
            method([])
    base = model_with(chat_class, make_base(tmp_path / "base"), documents)
    with pytest.raises(ValueError, match="without a trained segmentation head.*model_weights="):
        base.generate_until([request(4, {"segment": True})])
    with pytest.raises(ValueError, match="dtype=int8 is unknown; one of fp32"):
        chat_class(version, dtype="int8")


def test_options_of_a_task(chat_class):
    module = sys.modules[chat_class.__module__]
    assert module.sampling({"temperature": 0, "top_p": 0.9, "num_beams": None}) == {"num_beams": 1}
    assert module.sampling({"temperature": 0.7, "do_sample": False}) == {"num_beams": 1}
    sampled = {"num_beams": 2, "do_sample": True, "temperature": 0.7, "top_p": 1.0}
    assert module.sampling({"temperature": 0.7, "num_beams": 2}) == sampled
    assert module.cut("a cat\n\nQ: next", ["", "\n\n", "Q"]) == "a cat"
    assert module.cut("a cat. It", ".") == "a cat"


def test_every_split_of_the_default_evaluation_is_a_task():
    tasks = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in TASKS.glob("*.yaml")}
    assert {name: task["dataset_name"] for name, task in tasks.items()} == {
        f"self1e_{file_stem(split)}": split for split in DEFAULT_SPLITS
    }
    for name, task in tasks.items():
        general = "grefcoco" in task["dataset_name"]
        assert task["task"] == name and task["include"] == ("_generalised" if general else "_split")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("lmms") / "dataset")


def lmms_eval(output, *flags, **environment) -> dict:
    """Figures by task of a run of lmms-eval's own program."""
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "self1e",
        "--output_path",
        output,
        "--log_samples",
        *flags,
    ]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(output / "hub"), **environment}
    ran = subprocess.run([*map(str, command)], env=os.environ | variables, capture_output=True, text=True, timeout=400)
    (results,) = output.rglob("*_results.json")
    assert ran.returncode == 0, ran.stderr
    return json.loads(results.read_text(encoding="utf-8"))["results"]


@needs_package
def test_figures_are_those_of_the_evaluation(version, tree, tmp_path):
    tasks = {split: f"self1e_{file_stem(split)}" for split in (GREF, REASON)}
    flags = ["--include_path", TASKS, "--tasks", ",".join(tasks.values()), "--batch_size", "4"]
    found = lmms_eval(tmp_path / "out", *flags, "--model_args", f"pretrained={version}", SELF1E_DATASET_DIR=str(tree))
    model, processor = Self1EForSegmentation.from_pretrained(version), Self1EProcessor.from_pretrained(version)
    torch.set_num_threads(1)
    ours = evaluate_splits(model, processor, tasks, dataset_dir=tree, output_dir=tmp_path / "eval", workers=0)
    for split, task in tasks.items():
        assert [found[task][f"{name},none"] for name in ("giou", "ciou")] == [
            ours[split][name] for name in ("giou", "ciou")
        ]
    names = {"rela_giou": "giou", "rela_ciou": "ciou", "n_acc": "n_acc", "t_acc": "t_acc"}
    assert {name: found[tasks[GREF]][f"{name},none"] for name in names} == {
        name: ours[GREF]["rela"][key] for name, key in names.items()
    }
    assert 0 < ours[GREF]["ciou"] < 1


@needs_package
def test_replies_of_other_models():
    spec = spec_from_file_location("tasks_utils", TASKS / "utils.py")
    utils = module_from_spec(spec)
    spec.loader.exec_module(utils)
    left, right = (encode_mask(np.arange(8)[None].repeat(4, 0) // 4 == side) for side in (0, 1))
    cases = {
        json.dumps({"masks": [left]}): 16,
        json.dumps({"masks": [left, right], "scores": [0.9, 0.1]}): 32,  # several are united
        json.dumps({"masks": []}): 0,
        "It is the cup.": 0,
        "[]": 0,
        json.dumps({"masks": [{"size": [4, 8]}]}): 0,
        json.dumps({"masks": [left | {"counts": "oo"}]}): 0,
    }
    assert {reply: utils.united(reply, (4, 8)).sum() for reply in cases} == cases
    assert utils.united(json.dumps({"masks": [left]}), (8, 16))[:, :8].all()


@needs_package
def test_a_task_of_questions(version, tmp_path):
    noise(60, 60).save(tmp_path / "photo.png")
    lines = [json.dumps({"question": f"What is number {n}?", "answer": "x"}) for n in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "utils.py").write_text(
        f"from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open({str(tmp_path / 'photo.png')!r})]\n"
    )
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: question\ndoc_to_target: answer\ngeneration_kwargs: {max_new_tokens: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    flags = ["--include_path", tmp_path, "--tasks", "toy", "--limit", "2", "--model_args", f"pretrained={version}"]
    assert lmms_eval(tmp_path / "out", *flags)["toy"]["exact_match,none"] == 0
    (samples,) = (tmp_path / "out").rglob("*samples_toy.jsonl")
    assert len(samples.read_text().splitlines()) == 2
