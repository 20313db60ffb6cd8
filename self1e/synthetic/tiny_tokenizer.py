"""A small byte-level tokenizer with the added tokens of InternVL3's, learned from the synthetic words."""

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer

from self1e.model.prompts import END_OF_TURN, SYSTEM

# Added tokens in the order of InternVL3's tokenizer; their ids follow the byte-pair vocabulary.
ADDED_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>"
).split()

# What the byte-pair merges are learned from: the prompts, and the words of the synthetic data. Any other text is
# spelled with smaller pieces, down to bytes.
CORPUS = f"""
system {SYSTEM} user assistant
Can you segment the red circle in this image? Please segment the green square in this image.
What is the blue triangle in this image? Please respond with segmentation mask. Please output segmentation mask.
Please output segmentation mask and explain why. and explain the reason. and give some explanation.
It is . Sure, . Sure, it is . Sure, the segmentation result is .
Answer the question using a single word or phrase. Please answer yes or no. Yes No yes no
When the provided information is insufficient, respond with 'Unanswerable'. unanswerable
Answer with the option's letter from the given choices directly. A. B. C. D. A B C D
red green blue yellow purple orange circle square triangle star cross ring shape shapes
left right leftmost rightmost top bottom largest smallest larger smaller thing picture
that is on the side to above below next behind in front and or both all two three four one of them everything but
How many shapes are there? Which colour color does it have? Is there a an any? Describe this picture. This shows.
because it its has have with without only no corners five points round hole arms sides 0 1 2 3 4 5 6 7 8 9
"""


def make_tokenizer(vocab_size: int) -> Qwen2Tokenizer:
    """256 byte symbols (`!` is id 0) and merges, `vocab_size` at most, then the added tokens."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = CORPUS.strip().splitlines()
    trained.train_from_iterator(
        lines + [f" {line}" for line in lines],
        BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    merges: Any = map(tuple, json.loads(trained.to_str())["model"]["merges"])
    tokenizer = Qwen2Tokenizer(trained.get_vocab(), list(merges))
    tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    tokenizer.eos_token = END_OF_TURN
    return tokenizer
