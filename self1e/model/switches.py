"""The switches of the paper's ablations: their defaults, meanings and values, without torch.

The code of a value stands in a registry: `HEADS` in `head`, `REPLICATIONS` in `grids`, `PATHWAYS` in `attention`.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Switch:
    """A field of the configuration that a user may set: default, what it does, its values if they have names."""

    default: Any
    help: str
    choices: tuple[str, ...] | None = None

    def flag(self) -> dict[str, Any]:
        """What `add_argument` takes for a switch with named values; without the flag, the checkpoint decides."""
        return {"choices": self.choices, "help": f"{self.help}; unset: the checkpoint's, or {self.default}"}


# Fields that `from_pretrained` and the training program's flags set.
SWITCHES = {
    "mask_features": Switch("rfa", "features that the mask is read from", ("baseline", "replication", "rfr", "rfa")),
    "replication": Switch(
        "tile", "how patch tokens are replicated for the mask's image side", ("tile", "window", "interpolate")
    ),
    "attention_pathway": Switch(
        "image+seg", "what image tokens see besides the causal past", ("causal", "image", "image+seg")
    ),
    "auxiliary_loss": Switch(True, "train the LLM's own image features with the mask losses, too"),
    "auxiliary_projection": Switch(False, "send the auxiliary image side through f_out, too"),
    "rope_precision": Switch("fp32", "precision of the LLM's rotary frequencies", ("fp32", "bf16")),
    "ce_loss_weight": Switch(1.0, "weight of the text's cross-entropy"),
    "bce_loss_weight": Switch(2.0, "weight of the masks' binary cross-entropy"),
    "dice_loss_weight": Switch(0.5, "weight of the masks' Dice loss"),
}
