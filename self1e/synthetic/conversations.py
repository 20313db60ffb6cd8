"""LLaVA-Instruct: conversations about a photo."""

from pathlib import Path

import numpy as np

from self1e.synthetic.annotations import share, write
from self1e.synthetic.scenes import Scene
from self1e.synthetic.words import a, facts


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
