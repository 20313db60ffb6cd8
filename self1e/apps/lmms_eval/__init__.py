"""The plugin of lmms-eval: Self1E as a model, and the segmentation splits of the tree as tasks.

    python -m lmms_eval --model self1e --model_args pretrained=runs/NAME/ckpt_model --tasks mme,pope --batch_size 8
    python -m lmms_eval --model self1e --model_args pretrained=runs/NAME/ckpt_model --batch_size 16 \\
        --include_path self1e/apps/lmms_eval/tasks --tasks self1e_refcoco_unc_val

lmms-eval finds the model through the entry point `lmms_eval.models` of this package, whose payload is `manifest`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """What lmms-eval has to know of the model before it loads it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="self1e", chat_class_path="self1e.apps.lmms_eval.model.Self1EChat")
