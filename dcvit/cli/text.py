"""Text that several commands print."""

from collections.abc import Sequence

__all__ = ["saved", "span", "table"]


def saved(folder: str, page: str) -> str:
    """Say where a result and its report are, and how to load the result."""
    return (
        f"Saved to {folder}: after `import dcvit`, timm.create_model('local-dir:{folder}', pretrained=True).\n"
        f"Report: {page}"
    )


def span(values: Sequence[int]) -> str:
    """Format the smallest and the largest value, or a single value if they are equal."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def table(rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Format rows of text as columns, with a rule under the first row.

    Args:
        rows: The cells of each row; the first row holds the titles.
        left: Whether all columns are aligned to the left; else only the first column is.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            text.ljust(width) if left or not i else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *(line(row) for row in rows[1:])])
