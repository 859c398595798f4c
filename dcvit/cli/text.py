"""What several commands print."""

from collections.abc import Sequence

__all__ = ["saved", "span", "table"]


def saved(folder: str, page: str) -> str:
    """Where a result and its report are, and how to load it."""
    return (
        f"Saved to {folder}: after `import dcvit`, timm.create_model('local-dir:{folder}', pretrained=True).\n"
        f"Report: {page}"
    )


def span(values: Sequence[int]) -> str:
    """The least and the largest, or the one value that there is."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def table(rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Rows of text in columns with a rule under the first row; the first column to the left, the others as said."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            text.ljust(width) if left or not i else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *(line(row) for row in rows[1:])])
