"""`--trainable_embeddings new`: of embedding and `lm_head`, the rows of the added tokens train and the others do not.

The rows are a parameter of their own, so that the optimizer keeps states for them alone. `weight` stays frozen until
`merge_new_rows` writes the rows into it, so that a saved model has the layout of any other.
"""

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS = "new_rows"  # name of the parameter, (added tokens, C)
HOOK = "new_rows_hook"


def train_new_rows(model: PreTrainedModel, first: int) -> None:
    """Freeze embedding and `lm_head` in place, but for the rows from token id `first` on.

    Tied matrices share their new rows, too. Raises ValueError when the vocabulary ends before `first`.
    """
    embedding, lm_head = _matrices(model)
    size = embedding.weight.shape[0]
    if not first < size:
        raise ValueError(f"--trainable_embeddings new: the vocabulary of {size} tokens holds none from {first} on")
    rows: dict[int, nn.Parameter] = {}  # by matrix
    for module, hook in ((embedding, _embed), (lm_head, _score)):
        matrix = module.weight.requires_grad_(False)
        own = rows.setdefault(id(matrix), nn.Parameter(matrix.detach()[first:].clone()))
        module.register_parameter(ROWS, own)
        setattr(module, HOOK, module.register_forward_hook(partial(hook, first)))


def merge_new_rows(model: PreTrainedModel) -> None:
    """Write the trained rows into their matrices and leave plain modules; a model without such rows stays as it is."""
    for module in _matrices(model):
        if ROWS not in module._parameters:
            continue
        rows = getattr(module, ROWS)
        with torch.no_grad():
            module.weight[-len(rows) :] = rows
        getattr(module, HOOK).remove()
        delattr(module, HOOK)
        delattr(module, ROWS)


def _matrices(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    return cast(nn.Embedding, model.get_input_embeddings()), cast(nn.Linear, model.get_output_embeddings())


def _embed(first: int, module: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
    """Replace the vectors (..., C) of added tokens among those of `ids` (...)."""
    (ids,) = inputs
    added = F.embedding((ids - first).clamp(min=0), getattr(module, ROWS))
    return torch.where((ids >= first).unsqueeze(-1), added, embedded)


def _score(first: int, module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
    """Replace the logits (..., vocabulary) of added tokens for states (..., C)."""
    (states,) = inputs
    return torch.cat([logits[..., :first], F.linear(states, getattr(module, ROWS))], dim=-1)
