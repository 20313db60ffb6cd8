"""Questions about scenes: LLaVA-Instruct below `dataset/`; five sets and eleven benchmarks below `data/`."""

import base64
from pathlib import Path

import numpy as np

from self1e.files import to_jsonl
from self1e.model.prompts import VQA_INSTRUCTION
from self1e.synthetic.annotations import share, write
from self1e.synthetic.scenes import Scene
from self1e.synthetic.words import a, absent, facts

OPEN_ENDED = {  # set: (folder of photos, official annotations); {} is train or val
    "vqav2": ("{}2014", "v2_mscoco_{}2014_annotations"),
    "okvqa": ("{}2014", "mscoco_{}2014_annotations"),
    "textvqa": ("train_images", "textvqa_{}_annotations"),
    "vizwiz": ("{}", "vizwiz_{}_annotations"),
}
MME = (
    "existence count position color posters celebrity scene landmark artwork OCR commonsense_reasoning "
    "numerical_calculation text_translation code_reasoning"
).split()


def write_conversations(root: Path, scenes: list[Scene], seed: int) -> None:
    """LLaVA-Instruct: two or more turns about coco/train2017 photos; `<image>` first or last in its turn."""
    records = []
    for i, scene in enumerate(share(scenes, 8)):
        rng = np.random.default_rng([seed, scene.id, 4])
        names = [a(shape.name) for shape in scene.shapes]
        opening = "Describe this picture."
        turns = [
            f"<image>\n{opening}" if i % 2 else f"{opening}\n<image>",
            f"This picture shows {', '.join(names[:-1])} and {names[-1]}.",
        ]
        for question, answer, _ in facts(rng, scene)[:2]:
            turns += [question, f"{answer.capitalize()}."]
        file_name = f"{scene.id:012d}.jpg"
        write(root / "coco/train2017" / file_name, scene.jpeg)
        conversation = [{"from": ("human", "gpt")[j % 2], "value": text} for j, text in enumerate(turns)]
        records.append({"id": file_name.removesuffix(".jpg"), "image": file_name, "conversations": conversation})
    write(root / "llava_dataset/llava_instruct_150k.json", records)


def write_vqa(root: Path, train: list[Scene], val: list[Scene], seed: int) -> None:
    """vqav2, okvqa, textvqa, vizwiz and gqa for training, and all benchmarks."""
    held_out = share(val, 4)
    for split, scenes in (("train", share(train, 8)), ("val", held_out)):
        for name in OPEN_ENDED:
            write_open_ended(root / name, name, split, scenes, seed)
        write_gqa(root / "gqa", split, scenes, seed)
    write_pope(root / "pope", held_out, seed)
    write_mme(root / "mme/MME_Benchmark_release_version", held_out, seed)
    write_mmbench(root / "mmbench", held_out, seed)


def write_open_ended(root: Path, name: str, split: str, scenes: list[Scene], seed: int) -> None:
    """A set with ten answers per question, two of which differ, as people do."""
    folder, stem = (text.format(split) for text in OPEN_ENDED[name])
    lines: list[dict] = []
    annotations: list[dict] = []
    for scene in scenes:
        rng = np.random.default_rng([seed, scene.id, 5])
        file_name = f"COCO_{split}2014_{scene.id:012d}.jpg"
        write(root / folder / file_name, scene.jpeg)
        asked = facts(rng, scene)[:2]
        if name == "vizwiz":
            asked[1] = ("What does this cost?", "unanswerable", "unanswerable")
        for question, answer, answer_type in asked:
            number = len(lines)
            image = f"data/{name}/{folder}/{file_name}"
            lines.append({"image": image, "question": question, "question_id": number, "answer": answer})
            annotations.append({
                "image_id": scene.id, "question_id": number, "answer_type": answer_type,
                "question_type": " ".join(question.lower().split()[:2]),
                "answers": [{"answer": answer}] * 8 + [{"answer": "not sure"}] * 2,
            })  # fmt: skip
    write(root / f"{name}_{split}.jsonl", to_jsonl(lines))
    write(root / f"{stem}.json", {"annotations": annotations})


def write_gqa(root: Path, split: str, scenes: list[Scene], seed: int) -> None:
    lines, questions = [], {}
    for scene in scenes:
        rng = np.random.default_rng([seed, scene.id, 6])
        write(root / f"images/n{scene.id}.jpg", scene.jpeg)
        for j, (question, answer, kind) in enumerate(facts(rng, scene)[:2]):
            question_id = str(20_000_000 + scene.id * 10 + j)
            image = f"data/gqa/images/n{scene.id}.jpg"
            lines.append({"image": image, "question": question, "question_id": question_id, "answer": answer})
            types = {"structural": "verify" if kind == "yes/no" else "query", "semantic": "attr"}
            questions[question_id] = {
                "imageId": f"n{scene.id}", "question": question, "answer": answer, "isBalanced": True, "types": types,
            }  # fmt: skip
    name = "train_balanced" if split == "train" else "llava_gqa_testdev_balanced_qwen_format"
    write(root / f"{name}.jsonl", to_jsonl(lines))
    if split != "train":
        write(root / "testdev_balanced_questions.json", questions)


def write_pope(root: Path, scenes: list[Scene], seed: int) -> None:
    """Per scene and category one question with yes and one with no (adversarial: a colour that is there)."""
    lines: list[dict] = []
    for category in ("random", "popular", "adversarial"):
        labels: list[dict] = []
        for scene in scenes:
            rng = np.random.default_rng([seed, scene.id, 7])
            colour = {"random": None, "popular": "red", "adversarial": scene.shapes[0].colour}[category]
            image = f"COCO_val2014_{scene.id:012d}.jpg"
            write(root / "val2014" / image, scene.jpeg)
            for name, label in ((scene.shapes[0].name, "yes"), (" ".join(absent(rng, scene, colour=colour)), "no")):
                text = f"Is there {a(name)} in the image?"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": label})
                asked = {"text": f"{text}\n{VQA_INSTRUCTION.strip()}", "category": category}
                lines.append({"question_id": len(lines), "image": image, **asked})
        write(root / f"coco/coco_pope_{category}.json", to_jsonl(labels))
    write(root / "llava_pope_test.jsonl", to_jsonl(lines))


def write_mme(root: Path, scenes: list[Scene], seed: int) -> None:
    """Fourteen tables, two questions per photo, yes then no."""
    for table in MME:
        for scene in scenes:
            rng = np.random.default_rng([seed, scene.id, 8])
            pairs = ((scene.shapes[-1].name, "Yes"), (" ".join(absent(rng, scene)), "No"))
            asked = [f"Is there {a(name)} in this image? Please answer yes or no.\t{label}\n" for name, label in pairs]
            write(root / table / f"{scene.id:012d}.jpg", scene.jpeg)
            write(root / table / f"{scene.id:012d}.txt", "".join(asked))


def write_mmbench(root: Path, scenes: list[Scene], seed: int) -> None:
    """Dev and test, English and Chinese, every question once per rotation of its four options."""
    for name in "dev_20230712", "dev_cn_20231003", "test_en_20231003", "test_cn_20231003":
        question = "图中有下面哪一个？" if "_cn_" in name else "Which of these is in the image?"
        split, rows = name.split("_")[0], []
        for i, scene in enumerate(scenes):
            rng = np.random.default_rng([seed, scene.id, 9])
            options = [scene.shapes[-1].name]
            while len(options) < 4:
                options += {" ".join(absent(rng, scene))} - set(options)
            for k in range(4):
                rows.append({
                    "index": 1 + i + k * 1_000_000, "question": question, "hint": "",
                    **dict(zip("ABCD", options[k:] + options[:k])),
                    **({"answer": "ABCD"[-k % 4]} if split == "dev" else {}), "category": "object_localization",
                    "image": base64.b64encode(scene.jpeg).decode(), "source": "shapes",
                    "l2-category": "finegrained_perception (instance-level)", "comment": "", "split": split,
                })  # fmt: skip
        lines = ["\t".join(map(str, cells)) for cells in (rows[0], *(row.values() for row in rows))]
        write(root / f"mmbench_{name}.tsv", "\n".join(lines) + "\n")
