"""Draw the demo's example pictures into self1e/apps/demo_examples: three scenes of coloured shapes, with prompts.

    python -m self1e.synthetic.demo_examples        # 3 JPEGs, 150 kB, 1 s; the same bytes every time

They ship with the package, so that the demo has something to show without any download.
"""

import json
from pathlib import Path

from self1e.synthetic.scenes import draw_scene
from self1e.synthetic.words import RIDDLES

FOLDER = Path(__file__).resolve().parents[1] / "apps" / "demo_examples"
SCENES, SIZE, SEED = (2, 20, 14), 448, 2024


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    prompts = {}
    for scene_id in SCENES:
        scene = draw_scene(scene_id, seed=SEED, size=SIZE)
        name = "_".join(shape.kind for shape in scene.shapes) + ".jpg"
        (FOLDER / name).write_bytes(scene.jpeg)
        first, *others = scene.shapes
        prompts[name] = [f"the {shape.name}" for shape in others] + [RIDDLES[first.kind][1]]
    (FOLDER / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
