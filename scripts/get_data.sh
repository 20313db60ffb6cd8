#!/usr/bin/env bash
# Purpose: bring public data sets into dataset/ and data/, in the places that dataset/README.md and data/README.md show.
# Command: bash scripts/get_data.sh refcoco ReasonSeg         the sets and groups are listed below, and without arguments
#          DATASET_DIR=/big/dataset DATA_DIR=/big/data bash scripts/get_data.sh splits
# Cost:    the time of the downloads; everything is about 80 GB, and as much again for the archives in $DOWNLOADS.
# Result:  `self1e check-data` counts what arrived. A second call continues a download and overwrites nothing.
# It needs wget, unzip, and `hf` of huggingface_hub. The addresses come from the documentation of the sets; nobody has
# requested them for this script, so one may be dead by now. Sizes, licences and sums: dataset/README.md.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
D=${DATASET_DIR:-$root/dataset} V=${DATA_DIR:-$root/data}
A=${DOWNLOADS:-$D/downloads}
qwen=https://ofasys-wlcb.oss-cn-wulanchabu.aliyuncs.com/Qwen-VL/evaluation
internvl=https://github.com/OpenGVLab/InternVL/releases/download/data
mmbench=https://download.openmmlab.com/mmclassification/datasets/mmbench
archive=https://web.archive.org/web
refer=https://bvisionweb1.cs.unc.edu/licheng/referit/data
pope=https://github.com/AoiDragon/POPE/raw/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco

get() { # get URL [SHA256]: the file in $A, whole
    mkdir -p "$A"
    wget --continue --no-verbose --show-progress --directory-prefix "$A" "$1"
    if [ $# -gt 1 ]; then echo "$2  $A/${1##*/}" | sha256sum --check --quiet; fi
}
to() { # to FOLDER URL: a single file in its place
    mkdir -p "$1"
    wget --continue --no-verbose --show-progress --directory-prefix "$1" "$2"
}
from_hub() { # from_hub REPOSITORY FILE FOLDER: a file of a data set on the hub
    hf download "$1" "$2" --repo-type dataset --local-dir "$3"
}
open() { # open ARCHIVE FOLDER [MEMBER ...]: its members below FOLDER
    mkdir -p "$2"
    unzip -n -q "$A/$1" "${@:3}" -d "$2"
}
pick() { # pick ARCHIVE FOLDER MEMBER ...: members without the folders that they have in the archive
    mkdir -p "$2"
    unzip -n -q -j "$A/$1" "${@:3}" -d "$2"
}
link() { # link TARGET NAME: photos that several sets share
    mkdir -p "$(dirname "$2")"
    [ -e "$2" ] || ln -s "$(realpath "$1")" "$2"
}
by_hand() { echo "$1: download it in a browser from $2, then put $3" >&2; }

train2017() {
    get http://images.cocodataset.org/zips/train2017.zip 69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929
    open train2017.zip "$D/coco"
}
train2014() { # train2014 NAME ...: and the places where sets look for it
    get http://images.cocodataset.org/zips/train2014.zip ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775
    open train2014.zip "$V/coco"
    for name in "$@"; do link "$V/coco/train2014" "$name"; done
}
val2014() {
    get http://images.cocodataset.org/zips/val2014.zip fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0
    open val2014.zip "$V/coco"
    for name in "$@"; do link "$V/coco/val2014" "$name"; done
}
refer_photos() { train2014 "$D/refer_seg/images/mscoco/images/train2014"; }
refer_set() { # refer_set NAME PARTITION TIME: a copy of the archive, taken by the Internet Archive at TIME
    get "$archive/$3/$refer/$1.zip"
    pick "$1.zip" "$D/refer_seg/$1" "*refs($2).p" "*instances.json"
}

bring() {
    case $1 in
        sem_seg) bring_all ade20k cocostuff pascal_part paco_lvis ;;
        refer_seg) bring_all refclef refcoco refcoco+ refcocog ;;
        vqa) bring_all llava_instruct_150k vqav2 okvqa textvqa vizwiz gqa ;;
        splits) bring_all ReasonSeg refcoco refcoco+ refcocog grefcoco ;;
        benchmarks) bring_all vqa-vqav2-val vqa-okvqa-val vqa-textvqa-val vqa-vizwiz-val vqa-gqa-testdev pope mme mmbench ;;
        ade20k)
            get http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip 7ff1be44964418441f542a7cc1e1a650e7dc0fc275f5d23252bc9bbdbc977b29
            open ADEChallengeData2016.zip "$A"
            link "$A/ADEChallengeData2016" "$D/ade20k" ;;
        cocostuff)
            train2017
            get http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip
            open stuffthingmaps_trainval2017.zip "$D/cocostuff" 'train2017/*' ;;
        paco_lvis)
            train2017
            get https://dl.fbaipublicfiles.com/paco/annotations/paco_lvis_v1.zip 02ac4edb22c251e07853e6231d69aec3fad0a180f03de2f8c880650322debc80
            pick paco_lvis_v1.zip "$D/vlpart/paco/annotations" '*paco_lvis_v1_train.json' ;;
        pascal_part)
            get http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar
            get http://roozbehm.info/pascal-parts/trainval.tar.gz
            mkdir -p "$D/vlpart/pascal_part"
            tar --skip-old-files -xf "$A/VOCtrainval_03-May-2010.tar" -C "$D/vlpart/pascal_part"
            python "$root/scripts/pascal_part.py" "$A/trainval.tar.gz" "$D/vlpart/pascal_part" ;;
        mapillary) by_hand "$1" https://www.mapillary.com/dataset/vistas "config_v2.0.json and training/ into $D/mapillary" ;;
        refclef)
            get "$archive/20220515000000/http://bvisionweb1.cs.unc.edu/licheng/referit/data/images/saiapr_tc-12.zip"
            open saiapr_tc-12.zip "$D/refer_seg/images"
            refer_set refclef unc 20220413011817 ;;
        refcoco) refer_photos; refer_set refcoco unc 20220413011718 ;;
        refcoco+) refer_photos; refer_set refcoco+ unc 20220413011656 ;;
        refcocog) refer_photos; refer_set refcocog umd 20220413012904 ;;
        grefcoco)
            refer_photos
            for file in "grefs(unc).json" instances.json; do from_hub FudanCVL/gRefCOCO "$file" "$D/refer_seg/grefcoco"; done ;;
        ReasonSeg | reason_seg)
            for file in train.zip val.zip train.json; do from_hub 594zyc/GROUNDHOG-RAW "ReasonSeg/$file" "$A"; done
            open ReasonSeg/train.zip "$D/reason_seg/ReasonSeg"
            open ReasonSeg/val.zip "$D/reason_seg/ReasonSeg"
            mkdir -p "$D/reason_seg/ReasonSeg/explanatory"
            cp --update "$A/ReasonSeg/train.json" "$D/reason_seg/ReasonSeg/explanatory/train.json"
            by_hand "ReasonSeg|test" https://drive.google.com/drive/folders/125mewyg5Ao6tZ3ZdJ-1-E3n04LGVELqy "test/ into $D/reason_seg/ReasonSeg" ;;
        llava_instruct_150k) train2017; from_hub liuhaotian/LLaVA-Instruct-150K llava_instruct_150k.json "$D/llava_dataset" ;;
        vqav2) train2014 "$V/vqav2/train2014"; to "$V/vqav2" "$qwen/vqav2/vqav2_train.jsonl" ;;
        okvqa) train2014 "$V/okvqa/train2014"; to "$V/okvqa" "$qwen/okvqa/okvqa_train.jsonl" ;;
        textvqa | vqa-textvqa-val)
            get https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip
            open train_val_images.zip "$V/textvqa"
            to "$V/textvqa" "$qwen/textvqa/textvqa_train.jsonl"
            to "$V/textvqa" https://huggingface.co/OpenGVLab/InternVL/raw/main/textvqa_val.jsonl
            to "$V/textvqa" "$qwen/textvqa/textvqa_val_annotations.json" ;;
        vizwiz) get https://vizwiz.cs.colorado.edu/VizWiz_final/images/train.zip; open train.zip "$V/vizwiz"; to "$V/vizwiz" "$qwen/vizwiz/vizwiz_train.jsonl" ;;
        vqa-vizwiz-val)
            get https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip
            open val.zip "$V/vizwiz"
            for file in vizwiz_val.jsonl vizwiz_val_annotations.json; do to "$V/vizwiz" "$qwen/vizwiz/$file"; done ;;
        gqa | vqa-gqa-testdev)
            get https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip
            get https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip
            open images.zip "$V/gqa"
            pick questions1.2.zip "$V/gqa" '*testdev_balanced_questions.json'
            to "$V/gqa" "$qwen/gqa/train_balanced.jsonl"
            to "$V/gqa" "$internvl/llava_gqa_testdev_balanced_qwen_format.jsonl" ;;
        vqa-vqav2-val)
            val2014 "$V/vqav2/val2014"
            to "$V/vqav2" "$qwen/vqav2/vqav2_val.jsonl"
            get https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Annotations_Val_mscoco.zip 0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e
            open v2_Annotations_Val_mscoco.zip "$V/vqav2" ;;
        vqa-okvqa-val)
            val2014 "$V/okvqa/val2014"
            to "$V/okvqa" "$qwen/okvqa/okvqa_val.jsonl"
            get https://okvqa.allenai.org/static/data/mscoco_val2014_annotations.json.zip
            open mscoco_val2014_annotations.json.zip "$V/okvqa" ;;
        pope)
            val2014 "$V/pope/val2014"
            to "$V/pope" "$internvl/llava_pope_test.jsonl"
            for kind in random popular adversarial; do to "$V/pope/coco" "$pope/coco_pope_$kind.json"; done ;;
        mme) hf download OpenGVLab/InternVL MME_Benchmark_release_version.zip --local-dir "$A"; open MME_Benchmark_release_version.zip "$V/mme" ;;
        mmbench) for file in dev_20230712 dev_cn_20231003 test_en_20231003 test_cn_20231003; do to "$V/mmbench" "$mmbench/mmbench_$file.tsv"; done ;;
        *) echo "get_data.sh: no set or group $1; called without arguments it lists them" >&2; exit 2 ;;
    esac
}
bring_all() { for name in "$@"; do echo "== $name"; bring "$name"; done; }

if [ $# -eq 0 ]; then
    echo "usage: bash scripts/get_data.sh SET...   sets, and groups of them:" >&2
    sed -n '/^bring()/,/^}/s/^        \([A-Za-z0-9_+ |-]*\)) *\(bring_all.*;;\)\{0,1\}.*/  \1  \2/p' "$0" | sed 's/bring_all/=/; s/;;//' >&2
    exit 2
fi
bring_all "$@"
