"""The layout that CONTRIBUTING describes: which folder may import which."""

import ast
from pathlib import Path

import pytest

from tests.tooling.figures import cycles, figures, imports, modules, targets

ROOT = Path(__file__).parents[2]

FLOORS = (
    {"_version", "errors", "serialization"},
    {"costs", "ops", "runtime"},
    {"config", "context"},
    {"budget", "models"},
    {"data", "history"},
    {"artifacts", "metrics", "recovery"},
    {"report", "search"},
    {"methods"},
    {"compression"},
    {"demo"},
    {"cli"},
)
"""From the bottom up. A folder imports from lower floors and from itself, never from its own floor or a higher one."""

FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
DOORS = {"dcvit", "dcvit.__main__"}

TREES = modules(ROOT)


def test_every_folder_has_a_floor() -> None:
    assert {name.split(".")[1] for name in TREES.keys() - DOORS} == FLOOR.keys()


@pytest.mark.parametrize("name", sorted(TREES.keys() - DOORS))
def test_imports_go_down(name: str) -> None:
    """Imports inside functions count too: they only hide an arrow."""
    folder = name.split(".")[1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets(node, TREES):
                assert target not in DOORS, f"{name} imports the root"
                other = target.split(".")[1]
                assert other == folder or FLOOR[other] < FLOOR[folder], (
                    f"{name} imports {target}, which is not below it"
                )


def test_no_modules_import_each_other() -> None:
    assert cycles(imports(TREES)) == []


def test_figures_of_the_structure() -> None:
    found = figures(ROOT)
    assert found.top_level_modules <= 8
    assert found.floors <= 11
