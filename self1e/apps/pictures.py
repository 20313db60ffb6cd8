"""Which pictures and prompts a command line means; what is wrong with them is said before a model loads."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

HEIF = {".heic", ".heif"}
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".pgm"} | HEIF


def find_pictures(arguments: Iterable[str], output: Path) -> list[Path]:
    """Files as given, and every picture in folders and their subfolders, sorted; each file once.

    Hidden files and what lies in `output` are left out. That a file is a picture shows when it is read.

    Raises:
        ValueError: a URL, a folder without pictures, `output` among the folders, HEIC pictures without pillow-heif.
        FileNotFoundError: files that do not exist, all in one message.
    """
    found: dict[Path, None] = {}
    for text in arguments:
        path = Path(text)
        if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
            raise ValueError(f"--image {text}: URLs are not fetched; download the picture and give its path")
        if not path.is_dir():
            found[path] = None
            continue
        if path.resolve() == output.resolve():
            raise ValueError(f"--output {output}: holds the pictures; choose another folder, or one inside it")
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in PICTURES
            and output.resolve() not in file.resolve().parents
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not inside:
            raise ValueError(f"--image {path}: no pictures in this folder ({', '.join(sorted(PICTURES))})")
        found |= dict.fromkeys(inside)
    absent = [str(path) for path in found if not path.exists()]
    if absent:
        raise FileNotFoundError(f"--image: no such file: {', '.join(absent)}")
    open_heif([path for path in found if path.suffix.lower() in HEIF])
    return list(found)


def open_heif(paths: list[Path]) -> None:
    """Let Pillow read these pictures of a phone. Raises ValueError where pillow-heif is not installed."""
    if not paths:
        return
    if find_spec("pillow_heif") is None:
        raise ValueError(f"--image {paths[0]}: HEIC pictures need pillow-heif: pip install pillow-heif")
    from pillow_heif import register_heif_opener

    register_heif_opener()


def read_prompts(file: Path) -> list[str]:
    """One prompt per line, empty lines left out. Raises ValueError when nothing is left or it is no UTF-8 text."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts_file {file}: not UTF-8 text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {file}: holds no prompt; expected one per line")
    return prompts
