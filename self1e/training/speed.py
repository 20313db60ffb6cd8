"""How well a run uses its device: operations of the model, the device's peak, and memory."""

import sys
import time
from functools import partial

import torch
from torch import Tensor, nn

from self1e.model.config import DTYPES
from self1e.model.modeling import Self1EForSegmentation

# Operations per second on bf16 or fp16 matrices, by a part of the GPU's name: the makers' figures, without sparsity.
PEAKS = {"B200": 2250e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
KINDS = {  # of checkpointing: the memory of its activations, in what `selective` keeps (counted by `apps.costs`)
    "--gradient_checkpointing full": 0.0,
    "--gradient_checkpointing selective": 1.0,
    "--no-gradient_checkpointing": 1.5,
}


class Work:
    """Counts the operations of a training pass, from how many rows go through the layers.

    `flops`: of the passes since the last `take`, forward and backward, without those of layers that run again.
    `repeated`: these, as `--gradient_checkpointing full` has them. `kept`: bytes that `selective` keeps. `largest`:
    the three of the largest pass, `kept` first.
    """

    def __init__(self, model: Self1EForSegmentation, dtype: torch.dtype):
        self.flops, self.repeated, self.kept, self.largest = 0, 0, 0, (0, 0, 0)
        self.itemsize = dtype.itemsize
        stacks = {
            model.model.language_model: model.config.text_config,
            model.model.vision_tower: model.config.vision_config,
        }
        inside = {module for stack in stacks for module in stack.modules()}
        for stack, config in stacks.items():  # not at its layers, which may be compiled, or run again
            stack.register_forward_hook(partial(self._count_stack, config))
        for module in set(model.modules()) - inside:
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._count_linear)

    def _count_stack(self, config, stack: nn.Module, _, output) -> None:
        if not torch.is_grad_enabled():
            return
        states = output.last_hidden_state
        batch, tokens, width = states.shape
        linears = [module for module in stack.modules() if isinstance(module, nn.Linear)]
        width = config.num_attention_heads * getattr(config, "head_dim", width // config.num_attention_heads)
        attention = 4 * tokens * width * config.num_hidden_layers  # per row: scores and their product with the values
        products = sum(2 * x.in_features * x.out_features for x in linears)
        trained = sum(2 * x.in_features * x.out_features for x in linears if x.weight.requires_grad)
        forward, backward = attention + products, states.requires_grad * (2 * attention + products + trained)
        self.flops += batch * tokens * (forward + backward)
        self.repeated += batch * tokens * forward * states.requires_grad
        kept = sum(x.out_features for x in linears) + width * config.num_hidden_layers
        self.kept += batch * tokens * kept * self.itemsize

    def _count_linear(self, linear: nn.Linear, _, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self.flops += (
                2 * (1 + output.requires_grad + linear.weight.requires_grad) * output.numel() * linear.in_features
            )

    def take(self) -> int:
        """The operations of the pass that has ended."""
        done = self.kept, self.flops, self.repeated
        self.largest, self.kept, self.flops, self.repeated = max(self.largest, done), 0, 0, 0
        return done[1]

    def advice(self, now: str | None, spare: int) -> str:
        """Which kind of checkpointing would fit, in a sentence. now: the flag's value. spare: free bytes."""
        current = f"--gradient_checkpointing {now}" if now else "--no-gradient_checkpointing"
        kept, flops, repeated = self.largest
        text = f"memory: {spare / 1e9:.0f} GB of the GPU stay free"
        for kind, factor in reversed(KINDS.items()):
            more = (factor - KINDS[current]) * kept
            if 0 < more < 0.9 * spare:
                saved = repeated / (flops + repeated) if now == "full" else 0
                saves = f"{saved:.0%} of the operations" if saved else "what is computed again"
                return f"{text}; {kind} would take about {more / 1e9:.0f} GB of them and save {saves}"
        return f"{text}; {current} is the fastest that fits"


def compile_layers(model: Self1EForSegmentation, **options) -> None:
    """Compile each layer of ViT and LLM in place, so that weights keep their names. options: of `torch.compile`."""
    torch._dynamo.config.recompile_limit = 128  # layers share their code, but have their own stochastic depth
    for layer in [*model.model.vision_tower.encoder.layer, *model.model.language_model.layers]:
        layer.compile(**options)


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second that products of matrices reach on a device: of `PEAKS`, or measured."""
    gpu = device.type == "cuda"
    known = [peak for name, peak in PEAKS.items() if gpu and name in torch.cuda.get_device_name(device)]
    if known and precision != "fp32":
        return known[0]
    side, seconds = 4096 if gpu else 512, []
    matrix = torch.ones(side, side, device=device, dtype=DTYPES[precision])
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the product
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def peak_memory() -> float:
    """The most bytes that this rank's tensors had on its GPU, or without one its process in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def spare_memory() -> int:
    """Bytes of the GPU that were never in use at the peak."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
