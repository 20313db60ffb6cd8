"""A small byte-level tokenizer with the files and added tokens of InternVL3's, learned from the synthetic words."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from self1e.files import write_json

# Added tokens in the order of InternVL3's tokenizer; their ids follow the byte-pair vocabulary.
QWEN_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
QWEN_PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()
INTERNVL_SPECIAL = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()
ADDED_TOKENS = QWEN_SPECIAL + QWEN_PLAIN + INTERNVL_SPECIAL

# What the byte-pair merges are learned from: the prompts, and the words of the synthetic data. Any other text is
# spelled with smaller pieces, down to bytes.
CORPUS = """
system You are an helpful assistant. user assistant
Can you segment the red circle in this image? Please segment the green square in this image.
What is the blue triangle in this image? Please respond with segmentation mask. Please output segmentation mask.
Please output segmentation mask and explain why. and explain the reason. and give some explanation.
It is . Sure, . Sure, it is . Sure, the segmentation result is .
Answer the question using a single word or phrase. Please answer yes or no. Yes No yes no
When the provided information is insufficient, respond with 'Unanswerable'. unanswerable
Answer with the option's letter from the given choices directly. A. B. C. D. A B C D
red green blue yellow purple orange white black pink brown cyan gray
circle square triangle star cross ring diamond hexagon circles squares triangles stars crosses rings
shape shapes object objects thing background part parts of top bottom half upper lower middle center
left right leftmost rightmost topmost lowest largest smallest biggest big small large tiny
that is on the side to above below next behind in front and or both all two three four one of them
How many shapes are there? Which colour color does it have? What is the color of the largest shape?
Is there a an any? Where is the? Describe this picture. This picture shows. Which kind of? has no corners five points
corner round hole pointed arms straight sides equal rolls wheel warning sign night sky first aid wedding finger
because it its would be used like looks has have with without most least only other 0 1 2 3 4 5 6 7 8 9
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Qwen2's splitting rule: 256 byte symbols (`!` is id 0) and merges, `vocab_size` at most."""
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=to_bytes.alphabet(), show_progress=False)
    lines = CORPUS.strip().splitlines()
    tokenizer.train_from_iterator(lines + [f" {line}" for line in lines], trainer)
    return tokenizer


def save_tokenizer(folder: Path, vocab_size: int) -> dict[str, int]:
    """Write the six files of a Qwen2 tokenizer; return the added tokens' ids."""
    tokenizer = train_tokenizer(vocab_size)
    tokenizer.model.save(str(folder))
    ids = {token: i for i, token in enumerate(ADDED_TOKENS, start=tokenizer.get_vocab_size())}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {
        "additional_special_tokens": QWEN_SPECIAL[1:],
        "eos_token": {"content": "<|im_end|>", **flags},
        "pad_token": {"content": "<|endoftext|>", **flags},
    }
    added = {str(i): {"content": token, **flags, "special": token not in QWEN_PLAIN} for token, i in ids.items()}
    config = {
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": QWEN_SPECIAL[1:], "bos_token": None, "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 12288, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    write_json(folder / "added_tokens.json", ids, indent=2)
    write_json(folder / "special_tokens_map.json", special, indent=2)
    write_json(folder / "tokenizer_config.json", config, indent=2)
    return ids
