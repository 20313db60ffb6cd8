"""What the command line of training has of its own: the layout of its help, and the refused flags."""

import argparse

LLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that take adapters
# Flags of the published program that had no effect there, or that have no meaning here.
REFUSED = {
    "vis_save_path": "pictures go to <log_base_dir>/<exp_name>/eval with --eval_visualize",
    "image_size": "the tile size is read from the checkpoint's configuration",
    "load_in_8bit": "quantised weights cannot be trained; for inference see self1e.apps.predict",
    "load_in_4bit": "quantised weights cannot be trained; for inference see self1e.apps.predict",
    "vision_pretrained": "the ViT comes with --version; there is no second vision encoder",
    "out_dim": "the head's width is the LLM's, read from the checkpoint",
    "train_mask_decoder": "there is no mask decoder; the head always trains",
    "use_mm_start_end": "<img> and </img> are part of InternVL's chat format, always",
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are some; the help texts say what an unset flag means."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=119)

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is refused: {REFUSED[self.dest]}")
