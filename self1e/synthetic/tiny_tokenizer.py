"""A small byte-level tokenizer with the added tokens of InternVL3's, learned from the synthetic words."""

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer

from self1e.model import prompts
from self1e.synthetic.scenes import PAIRS
from self1e.synthetic.words import RIDDLES

# Of the added tokens of InternVL3's tokenizer, in its order; their ids follow the byte-pair vocabulary.
ADDED_TOKENS = "<|endoftext|> <|im_start|> <|im_end|> <img> </img> <IMG_CONTEXT> <ref> </ref> <box> </box>".split()

# What the byte-pair merges are learned from: the prompts, and the words of the synthetic data. Any other text is
# spelled with smaller pieces, down to bytes.
TEMPLATES = prompts.SHORT_QUESTIONS + prompts.LONG_QUESTIONS + prompts.EXPLANATORY_QUESTIONS + prompts.ANSWERS
CORPUS = [text.format(name) for name in map(" ".join, PAIRS) for text in TEMPLATES]
CORPUS += [f"{text} " for riddle in RIDDLES.values() for text in riddle]
CORPUS += f"""
system {prompts.SYSTEM} user assistant {prompts.VIZWIZ_INSTRUCTION} unanswerable Please answer yes or no. Yes No yes no
Answer with the option's letter from the given choices directly. A. B. C. D. A B C D 0 1 2 3 4 5 6 7 8 9
left right leftmost rightmost top bottom largest smallest larger smaller thing picture that is above below everything
How many shapes are there? What color is the shape? Is there a an any? Describe this picture. This picture shows
""".splitlines()


def make_tokenizer(vocab_size: int) -> Qwen2Tokenizer:
    """256 byte symbols (`!` is id 0) and merges, `vocab_size` at most, then the added tokens."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS + [f" {line}" for line in CORPUS], trainer)
    merges: Any = map(tuple, json.loads(trained.to_str())["model"]["merges"])
    tokenizer = Qwen2Tokenizer(trained.get_vocab(), list(merges))
    tokenizer.add_tokens(ADDED_TOKENS, special_tokens=True)
    tokenizer.eos_token = prompts.END_OF_TURN
    return tokenizer
