"""The pages say what is true: links, sections, paths and flags that they name exist."""

import re
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "dataset/README.md", ROOT / "data/README.md"])
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:self1e|scripts|configs|examples|tests|docs|dataset|data)/[\w./*-]+)`")
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@named
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page}: there is no {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target} is no section"


@named
def test_named_paths_exist(page):
    for path in PATH.findall(prose(page)):
        if not path.startswith(("data/", "dataset/")) or path.endswith(".md"):
            assert list(ROOT.glob(path)), f"{page}: there is no {path}"


def test_sections_named_by_messages_exist():
    found = 0
    for file in [*ROOT.glob("self1e/**/*.py"), *ROOT.glob("*.sh"), *ROOT.glob("examples/*.py")]:
        for page, section in re.findall(r"(docs/[\w.]+\.md)(?:, section (\w[\w ]*\w))?", file.read_text()):
            assert (ROOT / page).is_file(), f"{file}: there is no {page}"
            assert not section or section.lower().replace(" ", "-") in anchors(ROOT / page), f"{file}: {section}"
            found += 1
    assert found
