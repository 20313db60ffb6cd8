"""The recomputing MLPs are the library's: same results, same gradients, same FLOPs, fewer states kept."""

from weakref import ref

import pytest
import torch
from peft.tuners.lora import LoraConfig, LoraModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen3Config
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from self1e.model.recomputation import RecomputingMLP, RecomputingVisionMLP

SIZES = {"hidden_size": 8, "intermediate_size": 24}
KINDS = {
    "qwen2": (RecomputingMLP, Qwen2MLP, Qwen2Config(**SIZES)),
    "qwen3": (RecomputingMLP, Qwen3MLP, Qwen3Config(**SIZES)),
    "ViT": (RecomputingVisionMLP, InternVLVisionMLP, InternVLVisionConfig(**SIZES)),
}


def pair(kind: str, *, adapted: bool = False) -> list[nn.Module]:
    """Ours and the library's, with the same weights; `adapted`, the last linear layer holds an adapter."""
    ours, library, config = KINDS[kind]
    mlps = []
    for cls in (ours, library):
        torch.manual_seed(0)
        mlp = cls(config)
        if adapted:
            last = "fc2" if kind == "ViT" else "down_proj"
            LoraModel(nn.ModuleDict({"mlp": mlp}), LoraConfig(r=2, target_modules=[last], lora_dropout=0.5), "default")
        mlps.append(mlp)
    return mlps


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_the_librarys(kind, adapted):
    found = []
    for mlp in pair(kind, adapted=adapted):
        x = torch.linspace(-3, 3, 40).reshape(1, 5, 8).requires_grad_()
        torch.manual_seed(1)  # of the adapter's dropout
        with FlopCounterMode(display=False) as counter:
            y = mlp(x)
            y.pow(2).sum().backward()
        gradients = [parameter.grad for parameter in mlp.parameters() if parameter.requires_grad]
        found.append(([y, x.grad, *gradients], counter.get_total_flops()))
    (ours, our_flops), (library, flops) = found
    assert all(map(torch.equal, ours, library)) and len(ours) == len(library)
    assert our_flops == flops


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_last_layer_multiplies_is_not_kept(kind):
    """It is gone after the forward pass, unless the library recomputes the whole layer anyway."""
    ours, library = pair(kind)
    kept = []
    for mlp, whole_layer in ((ours, False), (library, False), (ours, True)):
        mlp.gradient_checkpointing = whole_layer
        states = []
        last = mlp.fc2 if kind == "ViT" else mlp.down_proj
        hook = last.register_forward_pre_hook(lambda _, x, states=states: states.append(ref(x[0].untyped_storage())))
        y = mlp(torch.ones(1, 5, 8))
        hook.remove()
        kept.append(states[0]() is not None)
        assert y.requires_grad
    assert kept == [False, True, True]
