"""The text of conversations: tokens with a meaning, questions, answers.

Templates are the published ones; `rng` decides which one is taken.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from self1e.errors import UserError

SEG, SEGT = "[SEG]", "[SEGT]"
IMAGE_TAG, IMG_START, IMG_CONTEXT, IMG_END = "<image>", "<img>", "<IMG_CONTEXT>", "</img>"
START_OF_TURN, END_OF_TURN, PADDING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# Tokens that structure a conversation; in a user's text they would forge images, masks or turns. InternVL's marks of
# objects, such as <ref> and <box>, are not among them: they are part of what its users may ask.
CONTROL = re.compile(r"\[SEGT?\]|<image>|</?img>|<IMG_CONTEXT>|<\|\w+\|>")  # the last: how Qwen names all of its own
SYSTEM = "You are an helpful assistant."  # sic: the weights were trained with it
CHAT_TEMPLATE = (
    f"{{{{ '{START_OF_TURN}system\n{SYSTEM}{END_OF_TURN}\n' }}}}"
    f"{{% for m in messages %}}{{{{ '{START_OF_TURN}' + m['role'] + '\n' }}}}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    f"{{{{ '{IMAGE_TAG}\n' if part['type'] == 'image' else part['text'] }}}}{{% endfor %}}{{% endif %}}"
    f"{{{{ '{END_OF_TURN}\n' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{START_OF_TURN}assistant\n' }}}}{{% endif %}}"
)
ANSWER = f"{SEG}."  # the answer that evaluation and `segment` give the model

SHORT_QUESTIONS = (
    "<image>\nCan you segment the {} in this image?",
    "<image>\nPlease segment the {} in this image.",
    "<image>\nWhat is {} in this image? Please respond with segmentation mask.",
    "<image>\nWhat is {} in this image? Please output segmentation mask.",
)
LONG_QUESTIONS = ("<image>\n{} Please respond with segmentation mask.", "<image>\n{} Please output segmentation mask.")
EXPLANATORY_QUESTIONS = (
    "<image>\n{} Please output segmentation mask and explain why.",
    "<image>\n{} Please output segmentation mask and explain the reason.",
    "<image>\n{} Please output segmentation mask and give some explanation.",
)
ANSWERS = ("It is [SEG].", "Sure, [SEG].", "Sure, it is [SEG].", "Sure, the segmentation result is [SEG].", "[SEG].")
# Marks in their normal form (the semicolon is the Greek question mark), and after them neither letter nor digit.
SENTENCE_END = re.compile(r"[.?!。؟۔।॥;՞։‽⸮።፧။។]\W*$")
VQA_INSTRUCTION = " Answer the question using a single word or phrase."
VIZWIZ_INSTRUCTION = " When the provided information is insufficient, respond with 'Unanswerable'." + VQA_INSTRUCTION


def draw(templates: tuple[str, ...], text: str, rng: np.random.Generator) -> str:
    """One of the templates, with a text in it."""
    return templates[rng.integers(len(templates))].format(text)


def question(text: str, rng: np.random.Generator, *, is_sentence: bool) -> str:
    """Asks for a mask with a whole sentence as it is, or by the name of a class or a phrase, lower-cased."""
    return draw(LONG_QUESTIONS, text, rng) if is_sentence else draw(SHORT_QUESTIONS, text.lower(), rng)


def answer(rng: np.random.Generator) -> str:
    """An answer with one [SEG]."""
    return ANSWERS[rng.integers(len(ANSWERS))]


def looks_like_sentence(text: str) -> bool:
    """Whether a text ends as sentences do: asked as it is ("Which one rolls?"), not as a phrase ("the ball")."""
    return bool(SENTENCE_END.search(unicodedata.normalize("NFKC", text)))


def evaluation_prompt(text: str, is_sentence: bool | None, lower: bool) -> str:
    """The fixed prompt of evaluation; note the blank after the line break. None: a sentence if it ends like one."""
    text = text.strip()
    if looks_like_sentence(text) if is_sentence is None else is_sentence:
        return f"<image>\n {text} Please output segmentation mask."
    return f"<image>\n What is {text.lower() if lower else text} in this image? Please output segmentation mask."


def reserved_in(text: str) -> list[str]:
    """The control tokens in a text as it is or lower-cased, such as `[SEG]` and `<|im_end|>`."""
    return CONTROL.findall(text) + CONTROL.findall(text.lower())


def never_written(tokenizer) -> list[int]:
    """Ids of the control tokens that no answer may hold: all but `[SEG]` and the end of the turn."""
    added = tokenizer.get_added_vocab().items()
    return [id for token, id in added if CONTROL.fullmatch(token) and token not in (SEG, END_OF_TURN)]


def chat_text(turns: Sequence[str]) -> tuple[str, list[range]]:
    """A conversation in the chat format, and its characters that are supervised: answers and their `<|im_end|>`."""
    text, answers = f"{START_OF_TURN}system\n{SYSTEM}{END_OF_TURN}\n", []
    for index, turn in enumerate(turns):
        text += f"{START_OF_TURN}{'assistant' if index % 2 else 'user'}\n"
        answers += [range(len(text), len(text) + len(turn + END_OF_TURN))] if index % 2 else []
        text += f"{turn}{END_OF_TURN}\n"
    return text + (f"{START_OF_TURN}assistant\n" if len(turns) % 2 else ""), answers


def visible(text: str) -> str:
    """A text without blanks, controls and invisible letters."""
    return "".join(letter for letter in text if unicodedata.category(letter)[0] not in "CZ")


def check_prompt(text: str) -> None:
    """Raise UserError for a prompt that is empty or holds a control token."""
    if not visible(text):
        raise UserError("a prompt is empty")
    if found := reserved_in(text):
        raise UserError(f"the prompt {text!r} holds the reserved token {found[0]}: leave it out")
