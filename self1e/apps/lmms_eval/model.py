"""Self1E as a chat model of lmms-eval: replies to questions about a photo, and masks for tasks that ask for them.

Replies are generated and decoded as `eval_vqas.sh --dynamic` does. A task whose `generation_kwargs` hold
`segment: true` gets masks as `eval_all.sh` predicts them, as a text of JSON: `{"masks": [{"size": [H, W], "counts":
"..."}]}` with one mask in COCO's compressed RLE at the photo's size, or none where no pixel is foreground.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

from self1e.data.masks import encode_mask
from self1e.evaluation.vqa.generation import generate_replies
from self1e.model.config import DTYPES
from self1e.model.inference import conversation_turns, predict_photo
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.photos import as_rgb
from self1e.model.processing import HIGH_RES_TILES, Self1EProcessor
from self1e.model.prompts import ANSWER

MAX_NEW_TOKENS = 1024  # of a task that sets no limit, as for lmms-eval's own models


class Request(NamedTuple):
    """One document as a conversation about one photo: user, assistant, ..., user."""

    photo: Image.Image
    turns: list[str]


class Self1EChat(lmms):
    """`--model self1e`; the arguments are those of `--model_args`, of `--device` and of `--batch_size`.

    Args:
        pretrained: folder or hub id of a checkpoint. model_weights: trained weights over it.
        dtype: fp32, bf16 or fp16; the default is bf16 on a CUDA GPU, else fp32.
        device: where to compute; the default is the device that accelerate chooses.
        batch_size: conversations per forward pass. max_batch_size: lmms-eval hands it over, and it decides nothing.
        max_tiles: of a photo in a question, without the thumbnail; 1 for the one resized photo.
        high_res: up to 4 tiles per photo in tasks that ask for masks.
        rope_precision: bf16 rounds the rotary frequencies as the published engine did.
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
        high_res: bool = False,
        rope_precision: str | None = None,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.batch_size, self.max_tiles, self.high_res = int(batch_size), max_tiles, high_res
        dtype = dtype or ("bf16" if self.device.type == "cuda" else "fp32")
        if dtype not in DTYPES:
            raise ValueError(f"--model_args dtype={dtype} is unknown; one of {', '.join(DTYPES)}")
        switches = {"rope_precision": rope_precision} if rope_precision else {}
        model = Self1EForSegmentation.from_pretrained(
            pretrained, weights=model_weights, dtype=DTYPES[dtype], **switches
        )
        model.generation_config = GenerationConfig()  # a checkpoint's own penalties would bend greedy search
        self.name, self.model = pretrained, model.to(self.device).eval()
        self.processor = Self1EProcessor.from_pretrained(pretrained)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The replies, in the order of the requests.

        Raises ValueError for a document that is no conversation about exactly one photo, and for masks of a model
        without a trained head.
        """
        groups: dict[str, list[int]] = {}  # a batch shares its generation options
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(number)
        replies = [""] * len(requests)
        with tqdm(total=len(requests), desc="Self1E", unit="request", disable=self.rank > 0) as bar:
            for numbers in groups.values():
                for start in range(0, len(numbers), self.batch_size):
                    chunk = numbers[start : start + self.batch_size]
                    for number, reply in zip(chunk, self._answer([requests[number] for number in chunk])):
                        replies[number] = reply
                    bar.update(len(chunk))
        return replies

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("self1e answers tasks of the kind generate_until only, not loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("self1e answers tasks of the kind generate_until only, not multi-round ones")

    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        """Replies to a batch of requests with the same options; a photo that several of them share is encoded once."""
        options = requests[0].args[2]
        groups: dict[int, list[int]] = {}  # photo -> the requests about it
        read = [self._read(request) for request in requests]
        for number, (photo, _) in enumerate(read):
            groups.setdefault(id(photo), []).append(number)
        photos = [read[numbers[0]].photo for numbers in groups.values()]
        rows = [[read[number].turns for number in numbers] for numbers in groups.values()]
        answered = self._masks(photos, rows) if options.get("segment") else self._texts(photos, rows, options)
        replies = dict(zip((number for numbers in groups.values() for number in numbers), answered))
        return [replies[number] for number in range(len(requests))]

    def _read(self, request: Instance) -> Request:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, *others = messages.extract_media()
        if len(images) != 1 or any(others):
            videos, sounds = map(len, others)
            raise ValueError(
                f"task {task}, document {doc_id}: {len(images)} pictures, {videos} videos and {sounds} sounds; self1e "
                "answers questions about exactly one picture"
            )
        texts: list[Any] = [
            {"role": message.role, "content": [part.model_dump() for part in message.content]}
            for message in messages.messages
        ]
        try:
            turns = conversation_turns(texts)
        except ValueError as error:  # a reserved token, or a system message
            raise ValueError(f"task {task}, document {doc_id}: {error}") from error
        photo = images[0]
        return Request(photo if isinstance(photo, Image.Image) else Image.open(photo), turns)

    def _texts(self, photos: list[Image.Image], rows: list[list[list[str]]], options: dict[str, Any]) -> list[str]:
        tiling = {"max_tiles": self.max_tiles, "thumbnail": self.max_tiles > 1}
        batch = dict(self.processor(photos, rows, padding_side="left", **tiling))
        del batch["labels"]
        limit = options.get("max_new_tokens", MAX_NEW_TOKENS)
        replies = generate_replies(self.model, self.processor.tokenizer, batch, limit, **sampling(options))
        return [cut(reply, options.get("until") or ()) for reply in replies]

    def _masks(self, photos: list[Image.Image], rows: list[list[list[str]]]) -> list[str]:
        if not self.model.trained_head:
            raise ValueError(
                f"{self.name} is a base model without a trained segmentation head, and the task asks for masks: give "
                "a trained checkpoint as --model_args pretrained=..., or its weights as model_weights=..."
            )
        found = []
        for photo, questions in zip(map(as_rgb, photos), rows):
            asked = [[*turns, ANSWER] for turns in questions]
            batch = dict(self.processor([photo], [asked], max_tiles=HIGH_RES_TILES if self.high_res else 1))
            size = (photo.height, photo.width)
            with torch.no_grad():
                masks = predict_photo(self.model, batch, size, rows_per_forward=len(asked), forwards=1)
            found += [json.dumps({"masks": [encode_mask(mask)] if mask.any() else []}) for mask in masks.cpu().numpy()]
        return found


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
