"""Tables for terminals and Markdown files."""

from collections.abc import Sequence


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
