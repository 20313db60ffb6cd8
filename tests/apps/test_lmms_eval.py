"""The plugin of lmms-eval: against the package where it is installed, else against a stand-in for its interface.

The stand-in has what lmms-eval 0.7.3 offers to a model.
"""

import abc
import dataclasses
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
from helpers import noise
from test_project import PROJECT

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.evaluation.vqa.generation import generate_replies


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
        monkeypatch.delitem(sys.modules, "self1e.apps.lmms_eval", raising=False)
    (payload,) = PROJECT["entry-points"]["lmms_eval.models"].values()
    module, _, function = payload.partition(":")
    manifest = getattr(importlib.import_module(module), function)()
    assert manifest.model_id == "self1e"
    module, _, name = manifest.chat_class_path.rpartition(".")
    yield getattr(importlib.import_module(module), name)
    sys.modules.pop("self1e.apps.lmms_eval", None)  # it would keep the stand-in


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


def test_a_document_without_exactly_one_photo_is_refused(chat_class, version):
    photo = ("image", noise(60, 60))
    documents = [
        {"media": [photo, photo], "text": "Which is larger?"},
        {"media": [("video", "a.mp4")], "text": "What?"},
    ]
    model = model_with(chat_class, version, documents)
    for number in range(2):
        with pytest.raises(ValueError, match=f"document {number}"):
            model.generate_until([request(number, {})])


def test_options_of_a_task(chat_class):
    module = sys.modules[chat_class.__module__]
    assert module.sampling({"temperature": 0, "top_p": 0.9, "num_beams": None}) == {"num_beams": 1}
    assert module.sampling({"temperature": 0.7, "do_sample": False}) == {"num_beams": 1}
    sampled = {"num_beams": 2, "do_sample": True, "temperature": 0.7, "top_p": 1.0}
    assert module.sampling({"temperature": 0.7, "num_beams": 2}) == sampled
    assert module.cut("a cat\n\nQ: next", ["", "\n\n", "Q"]) == "a cat"
    assert module.cut("a cat. It", ".") == "a cat"
