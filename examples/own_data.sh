#!/usr/bin/env bash
# Purpose: from 20 photos of your own to their masks in five commands. Copy this file, and change the five lines below.
# Command: bash examples/own_data.sh, or the five commands one by one; flags of the training may follow (--epochs 5)
# Cost:    the training takes 80 steps of 4 photos; on a GPU the rest takes seconds.
# Result:  runs/mine/masks. Below each command stands what it prints: here of 20 drawn photos with 60 sentences and
#          the quickstart's tiny model, which knows such shapes, so that it has little to learn from them.
#
# mine/all.csv has one line per sentence, as docs/data.md says ("Own data"):
#     image,mask,prompt
#     01.jpg,01_0.png,the blue cross
# with the photos in mine/images and the masks in mine/masks, PNGs of the photos' sizes, 0 outside and 255 inside.
DATA=${DATA:-mine}
VERSION=${VERSION:-OpenGVLab/InternVL3-2B} # the base
WEIGHTS=${WEIGHTS:-UltraDoughnut/SELF1E}   # the released weights over it, from which the training starts
RUN=${RUN:-mine}                           # results come to runs/$RUN
PROMPT=${PROMPT:-the red star}

set -euo pipefail

# 1. Check the data, look at the contact sheet, and hold out a fifth of the photos, once.
[ -e "$DATA/all_val.csv" ] || self1e check-data "$DATA/all.csv" --split 0.2
# | set          | read | photos | sentences | masks | empty | problems |
# | mine/all.csv |   20 |     20 |        60 |    60 |     0 |        0 |
# look at runs/check_data/contact_sheet.png
# mine/all_train.csv: 16 photos
# mine/all_val.csv: 4 photos

# 2. What the released weights know already.
val="custom|$DATA/all_val.csv"
bash eval_all.sh --version "$VERSION" --model_weights "$WEIGHTS" --exp_name "$RUN-before" --val_dataset "$val"
# | split                   |   n | gIoU | cIoU |
# | custom mine/all_val.csv |  11 | 80.7 | 83.0 |

# 3. Train. More GPUs: `deepspeed` in the place of `python`. Out of memory: --batch_size 1 --grad_accumulation_steps 4.
python train_hf_ivl_seq.py --config configs/small.yaml --version "$VERSION" --model_weights "$WEIGHTS" \
    --dataset custom --custom_data "$DATA/all_train.csv" --val_dataset "$val" --exp_name "$RUN" --no_eval "$@"
# an epoch: 16 samples, 4 steps of 4 x 1 x 1 photos (batch x micro-batches x ranks)
# step 80  epoch 20.000  loss 0.7146 (ce 0.2690, mask_bce 0.0936, mask_dice 0.5169)  ...
# saved runs/mine/ckpt_model, the curves are in runs/mine/curves.png

# 4. The same figures after it, and pictures of every sentence. If they are lower than in 2, train fewer epochs.
bash eval_all.sh "runs/$RUN" --val_dataset "$val" --eval_visualize
# pictures, worst first: runs/mine/eval/custom_mine_all_val_csv_00a1d3/overview.png
# | custom mine/all_val.csv |  11 | 78.7 | 81.1 |

# 5. The masks of a folder of photos.
self1e segment --version "runs/$RUN" --image "$DATA/images" --prompt "$PROMPT" --output "runs/$RUN/masks"
# the results of 20 photos are in runs/mine/masks
