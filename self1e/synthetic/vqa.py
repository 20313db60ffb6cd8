"""The VQA sets: five for training, eleven benchmarks for evaluation, all below `data/`."""

import base64
from pathlib import Path

import numpy as np

from self1e.files import to_jsonl
from self1e.synthetic.annotations import share, write
from self1e.synthetic.scenes import Scene, with_text
from self1e.synthetic.words import RIDDLES, a, absent, facts

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "ring": "圆环",
}  # fmt: skip
PROMPT = "Answer the question using a single word or phrase."


def write_vqa(root: Path, train: list[Scene], val: list[Scene], seed: int) -> None:
    """vqav2, okvqa, textvqa, vizwiz and gqa for training, all eleven benchmarks for evaluation, below `data/`."""
    for split, scenes in (("train", share(train, 8)), ("val", share(val, 4))):
        for name in ("vqav2", "okvqa", "textvqa", "vizwiz"):
            write_open_ended(root, name, split, scenes, seed)
        write_gqa(root / "gqa", split, scenes, seed)
    scenes = share(val, 4)
    write_pope(root / "pope", scenes, seed)
    write_mme(root / "mme", scenes, seed)
    write_mmbench(root / "mmbench", scenes, seed)


def write_open_ended(root: Path, name: str, split: str, scenes: list[Scene], seed: int) -> None:
    """One of the four sets with ten answers per question: photos, jsonl, questions and annotations."""
    folder = {
        "vqav2": f"{split}2014", "okvqa": f"{split}2014", "textvqa": "train_images", "vizwiz": split,
    }[name]  # fmt: skip
    stem = {
        "vqav2": ("v2_OpenEnded_mscoco_{}2014_questions", "v2_mscoco_{}2014_annotations"),
        "okvqa": ("OpenEnded_mscoco_{}2014_questions", "mscoco_{}2014_annotations"),
        "textvqa": ("textvqa_{}_questions", "textvqa_{}_annotations"),
        "vizwiz": ("vizwiz_{}_questions", "vizwiz_{}_annotations"),
    }[name]
    lines: list[dict] = []
    questions: list[dict] = []
    annotations: list[dict] = []
    image_id: int | str
    for i, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, scene.id, 5])
        jpeg, image_id, file_name = scene.jpeg, scene.id, f"COCO_{split}2014_{scene.id:012d}.jpg"
        shape = scene.shapes[-1]
        if name == "vqav2":
            rows = facts(rng, scene)[:2]
        elif name == "okvqa":
            phrase = RIDDLES[shape.kind][0]
            rows = [(f"Which kind is {phrase}?", shape.kind, "other")]
        elif name == "textvqa":
            number = str(rng.integers(100, 1000))
            image_id = f"{scene.id:016x}"
            jpeg, file_name = with_text(scene, number), f"{image_id}.jpg"
            rows = [("what number is written below?", number, "number")]
        else:
            file_name = image_id = f"VizWiz_{split}_{i:08d}.jpg"
            rows = [facts(rng, scene)[0], ("What does this cost?", "unanswerable", "unanswerable")]
        write(root / name / folder / file_name, jpeg)
        for j, (question, answer, answer_type) in enumerate(rows):
            question_id = len(lines) if name == "vizwiz" else scene.id * 1000 + j
            # Two of ten people disagree, as people do.
            texts = [answer] * 8 + ["not sure"] * 2
            answers = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts, 1)]
            key = {"image_id": image_id, "question_id": question_id}
            lines.append(line(f"data/{name}/{folder}/{file_name}", question, question_id, answer))
            questions.append(key | {"question": question})
            annotations.append(key | {
                "question_type": " ".join(question.lower().split()[:2]), "answer_type": answer_type,
                "multiple_choice_answer": answer, "answers": answers,
            })  # fmt: skip
    info = {"description": "synthetic shapes"}
    header = {"info": info, "license": {}, "data_type": "mscoco", "data_subtype": f"{split}2014"}
    write(root / name / f"{name}_{split}.jsonl", to_jsonl(lines))
    write(root / name / f"{stem[0].format(split)}.json", header | {"task_type": "Open-Ended", "questions": questions})
    write(root / name / f"{stem[1].format(split)}.json", header | {"annotations": annotations})


def line(image: str, question: str, question_id: int | str, answer: str) -> dict:
    """A line of the question files in use."""
    return {"image": image, "question": question, "question_id": question_id, "answer": answer}


def write_gqa(root: Path, split: str, scenes: list[Scene], seed: int) -> None:
    """GQA: train_balanced, or testdev_balanced under the names that evaluators look for."""
    lines, questions = [], {}
    for scene in scenes:
        rng = np.random.default_rng([seed, scene.id, 6])
        write(root / f"images/n{scene.id}.jpg", scene.jpeg)
        for j, (question, answer, kind) in enumerate(facts(rng, scene)[:2]):
            question_id = str(20_000_000 + scene.id * 10 + j)
            lines.append(line(f"data/gqa/images/n{scene.id}.jpg", question, question_id, answer))
            questions[question_id] = {
                "question": question, "answer": answer, "fullAnswer": f"{answer}.", "imageId": f"n{scene.id}",
                "isBalanced": True, "types": {"structural": "verify" if kind == "yes/no" else "query",
                                              "semantic": "attr", "detailed": "attr"},
                "groups": {"global": None, "local": question_id}, "semantic": [], "semanticStr": "", "entailed": [],
                "equivalent": [question_id], "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
            }  # fmt: skip
    if split == "train":
        write(root / "train_balanced.jsonl", to_jsonl(lines))
        write(root / "train_balanced_questions.json", questions)
        return
    for name in ("llava_gqa_testdev_balanced_qwen_format", "testdev_balanced"):
        write(root / f"{name}.jsonl", to_jsonl(lines))
    for name in ("testdev_balanced_questions", "testdev_balanced_all_questions"):
        write(root / f"{name}.json", questions)


def write_pope(root: Path, scenes: list[Scene], seed: int) -> None:
    """POPE: per scene and category one question with yes and one with no (adversarial: a colour that is there)."""
    lines: list[dict] = []
    for category in ("random", "popular", "adversarial"):
        labels: list[dict] = []
        for scene in scenes:
            rng = np.random.default_rng([seed, scene.id, 7])
            colour = {"random": None, "popular": "red", "adversarial": scene.shapes[0].colour}[category]
            image = f"COCO_val2014_{scene.id:012d}.jpg"
            write(root / "val2014" / image, scene.jpeg)
            for name, label in ((scene.shapes[0].name, "yes"), (" ".join(absent(rng, scene, colour=colour)), "no")):
                question = f"Is there {a(name)} in the image?"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": question, "label": label})
                lines.append(
                    {"question_id": len(lines), "image": image, "text": f"{question}\n{PROMPT}", "category": category}
                )
        write(root / f"coco/coco_pope_{category}.json", to_jsonl(labels))
    write(root / "llava_pope_test.jsonl", to_jsonl(lines))


def write_mme(root: Path, scenes: list[Scene], seed: int) -> None:
    """MME: fourteen tables, two questions per photo, yes then no."""
    tables = (
        "existence count position color posters celebrity scene landmark artwork OCR commonsense_reasoning "
        "numerical_calculation text_translation code_reasoning"
    ).split()
    for table in tables:
        rows = []
        for scene in scenes:
            rng = np.random.default_rng([seed, scene.id, 8])
            file_name, jpeg, shape, n = f"{scene.id:012d}.jpg", scene.jpeg, scene.shapes[-1], len(scene.shapes)
            left, *_, right = sorted(scene.shapes, key=lambda s: s.x)
            wrong = " ".join(absent(rng, scene))
            code = str(rng.integers(10, 90))
            right_text, wrong_text, ask = {
                "existence": (a(shape.name), a(wrong), "Is there {} in this image?"),
                "count": (f"{n} shapes", f"{n + 2} shapes", "Are there a total of {} in the image?"),
                "position": ("left", "right", f"Is the {left.name} on the {{}} side of the {right.name}?"),
                "OCR": (code, code[::-1] + "1", 'Is the number in the image "{}"?'),
                "numerical_calculation": (str(int(code) + 2), code, "Is the answer to the arithmetic question {}?"),
                "text_translation": (code, code + "0", "Is it right to translate the text in the image into {}?"),
                "code_reasoning": (code, code + "5", "The image shows a python code. Does it print {}?"),
                "scene": ("shapes on a wall", "a beach", "Is this picture captured in a place of {}?"),
            }.get(table, (a(shape.name), a(wrong), "Does this image show {}?"))
            shown = {"numerical_calculation": f"{code} + 2 =", "code_reasoning": f"print({code})"}
            text = shown.get(table, code if table in ("OCR", "text_translation") else None)
            if text:
                jpeg = with_text(scene, text)
            pair = [
                f"{ask.format(answer)} Please answer yes or no.\t{label}"
                for answer, label in ((right_text, "Yes"), (wrong_text, "No"))
            ]
            folder = root / "MME_Benchmark_release_version" / table
            write(folder / file_name, jpeg)
            write(folder / file_name.replace(".jpg", ".txt"), "".join(f"{line}\n" for line in pair))
            rows += [f"{file_name}\t{line}\n" for line in pair]
        write(root / f"Your_Results/{table}.txt", "".join(rows))


def write_mmbench(root: Path, scenes: list[Scene], seed: int) -> None:
    """MMBench: dev and test, English and Chinese, every question once per rotation of its four options."""
    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    for name, chinese, test in (
        ("dev_20230712", False, False),
        ("dev_cn_20231003", True, False),
        ("test_en_20231003", False, True),
        ("test_cn_20231003", True, True),
    ):
        kept = [column for column in columns if not (test and column == "answer")]
        lines = ["\t".join(kept)]
        for i, scene in enumerate(scenes):
            rng = np.random.default_rng([seed, scene.id, 9])
            options = [scene.shapes[-1].name]
            while len(options) < 4:
                options += {" ".join(absent(rng, scene))} - set(options)
            start = int(rng.integers(4))
            for k in range(4):
                order = [options[(j + k + start) % 4] for j in range(4)]
                question = "Which of these is in the image?"
                if chinese:
                    question = "图中有下面哪一个？"
                    order = ["".join(CHINESE[word] for word in option.split()) for option in order]
                row = {
                    "index": 1 + i + k * 1_000_000, "question": question, "hint": "", **dict(zip("ABCD", order)),
                    "answer": "ABCD"[-(k + start) % 4], "category": "object_localization",
                    "image": base64.b64encode(scene.jpeg).decode(), "source": "shapes",
                    "l2-category": "finegrained_perception (instance-level)", "comment": "",
                    "split": "test" if test else "dev",
                }  # fmt: skip
                lines.append("\t".join(str(row[column]) for column in kept))
        write(root / f"mmbench_{name}.tsv", "\n".join(lines) + "\n")
