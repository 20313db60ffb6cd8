"""MLPs that keep less for the backward pass, which computes again what lies behind their wide linear layers.

Only activations and products of elements are repeated, no product of matrices: selective activation recomputation
(Korthikanti et al., 2022). Results are the same to the last bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.internvl.modeling_internvl import InternVLVisionMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP


class RecomputingMLP(Qwen2MLP):
    """The MLP of Qwen2 and Qwen3; of its wide states, those before the activation are kept alone."""

    gradient_checkpointing = False  # the library sets it where the whole layer is computed again

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing or not torch.is_grad_enabled():
            return super().forward(x)
        return finish(lambda gate, up: self.act_fn(gate) * up, self.down_proj, self.gate_proj(x), self.up_proj(x))


class RecomputingVisionMLP(InternVLVisionMLP):
    """The same for the ViT."""

    gradient_checkpointing = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.gradient_checkpointing or not torch.is_grad_enabled():
            return super().forward(hidden_states)
        return finish(self.activation_fn, self.fc2, self.fc1(hidden_states))


def finish(activation: Callable[..., Tensor], last: nn.Module, *wide: Tensor) -> Tensor:
    """`last(activation(*wide))`, computed from `wide` once more in the backward pass.

    The repetition ends where a linear layer would multiply. An adapter in its place multiplies before it keeps what it
    needs, so the activation alone is repeated there.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if type(last) is nn.Linear:
        return checkpoint(lambda *x: last(activation(*x)), *wide, **options)
    return last(checkpoint(activation, *wide, **options))


def recompute_mlps(llm: PreTrainedModel, vit: PreTrainedModel) -> None:
    """Put these MLPs in place of the library's, in models that have no weights yet."""
    for layer in llm.get_submodule("layers").children():
        layer.mlp = RecomputingMLP(llm.config)
    for layer in vit.get_submodule("encoder.layer").children():
        layer.mlp = RecomputingVisionMLP(vit.config)
