"""Tables for terminals and Markdown files."""

from collections.abc import Mapping, Sequence

TITLES = {"ciou": "cIoU", "giou": "gIoU"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table whose columns also line up in a terminal; all but the first `text_columns` are flush right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    lines = (
        [cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        for row in cells
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def percent(value: float | None) -> str:
    """A fraction as the tables show it; `-` for a figure over nothing."""
    return "-" if value is None else f"{100 * value:.1f}"


def protocol_tables(results: Mapping[str, dict]) -> str:
    """What only some protocols of segmentation have, `name -> metrics.score(units)`: tables, a blank line above."""
    text = ""
    rela = {name: figures["rela"] for name, figures in results.items() if "rela" in figures}
    if rela:
        columns = {"gIoU": "giou", "cIoU": "ciou", "Pr@0.7": "pr@0.7", "Pr@0.8": "pr@0.8", "Pr@0.9": "pr@0.9"}
        columns |= {"N-acc": "n_acc", "T-acc": "t_acc"}
        rows = [[name, *(percent(figures[key]) for key in columns.values())] for name, figures in rela.items()]
        text += "\n" + markdown_table(["ReLA protocol", *columns], rows)
    rows = []
    for name, figures in results.items():
        if "bootstrap" in figures:
            intervals = [" to ".join(map(percent, figures["bootstrap"][key])) for key in ("giou", "ciou")]
            parts = [f"{percent(figures[q]['giou'])} / {percent(figures[q]['ciou'])}" for q in ("short", "long")]
            rows.append([name, *intervals, *parts])
    if rows:
        header = ["reasoning", "gIoU, 95% interval", "cIoU, 95% interval", "short gIoU / cIoU", "long gIoU / cIoU"]
        text += "\n" + markdown_table(header, rows)
    return text
