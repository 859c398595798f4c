"""What the benchmarks conclude from their figures."""

import pytest

from benchmarks import export, fuse
from benchmarks.compress import median_interval, verdict
from dcvit.models import compressible, load_model


@pytest.mark.parametrize(("count", "expected"), [(0, None), (5, None), (6, (1, 6)), (9, (2, 8)), (20, (6, 15))])
def test_interval_of_a_median_is_that_of_the_tables(count: int, expected: tuple[int, int] | None) -> None:
    """Ranks for 95 %, as tables of the sign test list them."""
    assert median_interval([float(i) for i in range(count, 0, -1)]) == expected


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.25] * 5 + [1.5], "1.250, 95 % interval [1.250, 1.500]: faster"),
        ([0.5] * 6, "0.500, 95 % interval [0.500, 0.500]: slower"),
        ([0.5, 1.5] * 3, "1.000, 95 % interval [0.500, 1.500]: no difference shown"),
        ([2.0] * 5, "2.000, too few pairs for an interval"),
    ],
)
def test_verdict_says_whether_one_is_excluded(ratios: list[float], expected: str) -> None:
    assert verdict(ratios) == expected


def test_export_takes_ratios_within_a_round() -> None:
    """A round in which everything took ten times as long changes neither ratio."""
    original = load_model("demo")
    models = {export.ORIGINAL: original, export.COMPRESSED: export.cut(original, 0.75)}
    slow = [1, 1, 10, 1, 10, 1]
    seconds = {
        ("PyTorch", export.ORIGINAL): [0.004 * factor for factor in slow],
        ("PyTorch", export.COMPRESSED): [0.003 * factor for factor in slow],
    }
    lines = export.table(seconds, models).splitlines()
    assert lines[-1] == "| PyTorch | 4.00 | 3.00 | 0.750 | 0.750 to 0.750 |"
    assert float(lines[0].rpartition("ratio ")[2]) == pytest.approx(0.75, abs=0.005)


def test_fuse_takes_ratios_within_a_round() -> None:
    slow = [1, 1, 10, 1, 10, 1]
    line = fuse.row("a model | 8", "all", [0.004 * factor for factor in slow], [0.003 * factor for factor in slow])
    assert line == "| a model | 8 | 4.0 | all | 0.750 | 0.750 to 0.750 | 0.750 to 0.750 |"
    assert any(block.compressible for block in compressible(fuse.student_of(load_model("demo"))).cost().blocks)
