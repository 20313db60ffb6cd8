"""The plugin of lmms-eval: Self1E as a chat model that answers questions about one photo.

    python -m lmms_eval --model self1e --model_args pretrained=runs/NAME/ckpt_model --tasks mme,pope --batch_size 8

lmms-eval finds the model through the entry point `lmms_eval.models` of this package, whose payload is `manifest`.
Replies are generated and decoded as `eval_vqas.sh --dynamic` does.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.evaluation.vqa.generation import generate_replies
from self1e.flags import DTYPES, precision_on
from self1e.model.inference import conversation_turns
from self1e.model.photos import photo_of

MAX_NEW_TOKENS = 1024  # of a task that sets no limit, as for lmms-eval's own models


def manifest() -> ModelManifest:
    """What lmms-eval has to know of the model before it loads it."""
    return ModelManifest(model_id="self1e", chat_class_path="self1e.apps.lmms_eval.Self1EChat")


class Self1EChat(lmms):
    """`--model self1e`; the arguments are those of `--model_args`, of `--device` and of `--batch_size`.

    dtype: without it bf16 on a CUDA GPU, else fp32. max_batch_size: lmms-eval hands it over, and it decides nothing.
    max_tiles: of a photo, without the thumbnail; 1 for the one resized photo.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        model_weights: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_tiles: int = 6,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.batch_size, self.max_tiles = int(batch_size), max_tiles
        precision = DTYPES[dtype or precision_on(self.device)]
        model = Self1EForSegmentation.from_pretrained(pretrained, weights=model_weights, dtype=precision)
        model.generation_config = GenerationConfig()  # a checkpoint's own penalties would bend greedy search
        self.model, self.processor = model.to(self.device).eval(), Self1EProcessor.from_pretrained(pretrained)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The replies, in the order of the requests. Raises ValueError for a document without exactly one photo."""
        replies: list[str] = []
        with tqdm(total=len(requests), desc="Self1E", disable=self.rank > 0) as bar:
            for options, group in groupby(requests, key=lambda request: request.args[2]):  # a batch shares its options
                asked = list(group)
                for start in range(0, len(asked), self.batch_size):
                    replies += self._answer(asked[start : start + self.batch_size], options)
                    bar.update(len(replies) - bar.n)
        return replies

    def loglikelihood(self, requests):
        raise NotImplementedError("self1e answers tasks of the kind generate_until alone")

    generate_until_multi_round = loglikelihood

    def _answer(self, requests: Sequence[Instance], options: dict[str, Any]) -> list[str]:
        photos, turns = zip(*map(self._read, requests))
        tiling = {"max_tiles": self.max_tiles, "thumbnail": self.max_tiles > 1}
        batch = dict(self.processor(photos, [[conversation] for conversation in turns], padding_side="left", **tiling))
        del batch["labels"]
        limit = options.get("max_new_tokens", MAX_NEW_TOKENS)
        replies = generate_replies(self.model, self.processor.tokenizer, batch, limit, **sampling(options))
        return [cut(reply, options.get("until") or ()) for reply in replies]

    def _read(self, request: Instance) -> tuple[Image.Image, list[str]]:
        """The photo of a document, and its turns: user, assistant, ..., user."""
        _, doc_to_messages, _, document, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][document]))
        images, *others = messages.extract_media()
        if len(images) != 1 or any(others):
            raise ValueError(f"task {task}, document {document}: self1e answers questions about exactly one picture")
        turns = [{"role": x.role, "content": [y.model_dump() for y in x.content]} for x in messages.messages]
        return photo_of(images[0]), conversation_turns(turns)


def sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` that a task's options mean: greedy search where the temperature is 0 or absent."""
    temperature, beams = options.get("temperature") or 0, options.get("num_beams") or 1
    if temperature == 0 or options.get("do_sample") is False:
        return {"num_beams": beams}
    return {"num_beams": beams, "do_sample": True, "temperature": temperature, "top_p": options.get("top_p") or 1.0}


def cut(reply: str, until: str | Sequence[str]) -> str:
    """The reply up to the first of the texts at which the task ends it."""
    for end in [until] if isinstance(until, str) else until:
        reply = reply.split(end)[0] if end else reply
    return reply.strip()
