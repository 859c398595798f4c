"""Figures of the structure of a checkout: `python -m tests.tooling.figures [CHECKOUT]`.

They are read from the sources alone; nothing is imported. Imports inside of functions count as lazy and are left out,
as are those under `if TYPE_CHECKING`.
"""

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Figures", "Function", "cycles", "figures", "floors", "functions", "imports", "modules", "targets"]

MOST_PARAMETERS = 7
"""Of a function outside of `ops` and `cli`."""

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One function or method.

    Attributes:
        name: The module and the qualified name.
        lines: Of its definition, with decorators left out.
        names: Of its parameters, without `self` and `cls`; `*args` and `**kwargs` count as one each.
    """

    name: str
    lines: int
    names: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """How many there are."""
        return len(self.names)


@dataclass(frozen=True)
class Figures:
    """What the structure of a checkout comes to.

    Attributes:
        top_level_modules: Modules directly in `dcvit/`, `__init__` and `__main__` left out.
        floors: Folders, and modules outside of folders, on the longest path of imports.
        module_floors: Modules on the longest path of imports.
        import_cycles: Groups of modules that import each other.
        lines: Of all Python files in `dcvit/`.
        root_exports: Names in `dcvit.__all__`.
        functions_over_seven_parameters: Outside of `ops` and `cli`.
        longest_functions: The five longest, with their lines.
    """

    top_level_modules: int
    floors: int
    module_floors: int
    import_cycles: int
    lines: int
    root_exports: int
    functions_over_seven_parameters: list[str]
    longest_functions: dict[str, int]


def modules(checkout: Path) -> dict[str, ast.Module]:
    """Return the syntax tree of each module of the package, by dotted name."""
    found = {}
    for path in sorted((checkout / "dcvit").rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return what each module imports of the package when it is imported itself."""
    return {
        name: {found for node in _eager(tree.body) for found in targets(node, trees)} - {name}
        for name, tree in trees.items()
    }


def _eager(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _eager(node.orelse)
        elif not isinstance(node, FunctionNode):
            for field in ("body", "orelse", "finalbody"):
                yield from _eager(getattr(node, field, []))


def targets(node: ast.Import | ast.ImportFrom, trees: dict[str, ast.Module]) -> Iterator[str]:
    """Yield the modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in trees)
    elif node.module in trees:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in trees else str(node.module)


def _of_folders(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the same graph of the folders of the package, and of the modules outside of them."""
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        found.setdefault(_folder(name), set()).update(map(_folder, others))
    return {name: others - {name} for name, others in found.items()}


def _folder(name: str) -> str:
    return ".".join(name.split(".")[:2])


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that import each other, directly or by way of others."""
    reach = {name: _reachable(name, graph) for name in graph}
    groups = {frozenset({name} | {other for other in reach[name] if name in reach[other]}) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def _reachable(name: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [name]
    while todo:
        for other in graph[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen


def floors(graph: dict[str, set[str]]) -> int:
    """Return how many modules lie on the longest path of imports; those of one cycle count once."""
    group = {name: frozenset({name}) for name in graph}
    for cycle in cycles(graph):
        group.update(dict.fromkeys(cycle, frozenset(cycle)))
    height: dict[frozenset[str], int] = {}

    def of(members: frozenset[str]) -> int:
        if members not in height:
            below = {group[other] for name in members for other in graph[name]} - {members}
            height[members] = 1 + max(map(of, below), default=0)
        return height[members]

    return max(of(members) for members in group.values())


def functions(trees: dict[str, ast.Module]) -> Iterator[Function]:
    """Yield every function and method, nested ones included."""
    for module, tree in trees.items():
        yield from _functions(tree, module)


def _functions(node: ast.AST, prefix: str) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            if isinstance(child, FunctionNode):
                yield Function(name, (child.end_lineno or 0) - child.lineno + 1, _parameters(child.args))
            yield from _functions(child, name)
        else:
            yield from _functions(child, prefix)


def _parameters(args: ast.arguments) -> tuple[str, ...]:
    several = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    named = (*args.posonlyargs, *args.args, *args.kwonlyargs, *several)
    return tuple(arg.arg for arg in named if arg.arg not in ("self", "cls"))


def figures(checkout: Path) -> Figures:
    """Return the figures of a checkout."""
    trees = modules(checkout)
    graph = imports(trees)
    found = sorted(functions(trees), key=lambda function: -function.lines)
    outside = [f for f in found if not f.name.startswith(("dcvit.ops", "dcvit.cli"))]
    exported = next(
        ast.literal_eval(node.value)
        for node in trees["dcvit"].body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    package = checkout / "dcvit"
    return Figures(
        top_level_modules=len([path for path in package.glob("*.py") if not path.name.startswith("__")]),
        floors=floors(_of_folders(graph)),
        module_floors=floors(graph),
        import_cycles=len(cycles(graph)),
        lines=sum(len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")),
        root_exports=len(exported),
        functions_over_seven_parameters=sorted(f.name for f in outside if f.parameters > MOST_PARAMETERS),
        longest_functions={f.name: f.lines for f in found[:5]},
    )


if __name__ == "__main__":
    print(json.dumps(asdict(figures(Path(sys.argv[1] if len(sys.argv) > 1 else "."))), indent=2))
