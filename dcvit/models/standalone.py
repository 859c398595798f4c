"""The file `modeling_dcvit.py` of a saved folder, with which the model loads where dcvit is not installed."""

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dcvit.errors import UnsupportedModelError
from dcvit.models.modeling import cnn, eva, shared, swin, variations, vision_transformer
from dcvit.models.modeling.variations import VARIATIONS

__all__ = ["standalone_source"]

_FAMILIES: dict[str, tuple[ModuleType, ...]] = {
    vision_transformer.ARCHITECTURE: (shared, variations, vision_transformer),
    eva.ARCHITECTURE: (shared, eva),
    swin.ARCHITECTURE: (shared, swin),
    cnn.ARCHITECTURE: (shared, cnn),
}
"""The modules that build the models of an architecture, each after those that it imports."""

_LINE = 120
"""The line length above which import statements are broken, as ruff does."""

_HEADER = '''\
# SPDX-License-Identifier: Apache-2.0
"""{title}

dcvit puts this file beside the weights of the model that it saves, so that the model also loads where dcvit is not
installed:

    import sys, timm
    sys.path.insert(0, "FOLDER")
    import modeling_dcvit  # makes the architecture known to timm
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

It holds only what that model needs, and the file of another folder may differ. Where dcvit is not installed, a process
can therefore load models with only one of these files.
"""
'''


@dataclass(frozen=True)
class _Statement:
    """A statement of a module's top level.

    Attributes:
        name: The name that it defines, `None` if it defines none.
        uses: All names that it uses.
        text: Its lines, including the comment above and the docstring below.
    """

    name: str | None
    uses: frozenset[str]
    text: str

    @property
    def is_block(self) -> bool:
        """Whether it is a function or a class, which two blank lines surround."""
        return self.text.startswith(("def ", "class ", "@"))


def standalone_source(config: Mapping[str, Any]) -> str:
    """Return the text of a model's modelling file: the parts of `dcvit.models.modeling` that build the model.

    A name means the same in all modules of a family, so that their texts can be concatenated.

    Args:
        config: The model's `config.json`.

    Raises:
        UnsupportedModelError: If the architecture is not one of dcvit's.
    """
    if (modules := _FAMILIES.get(config["architecture"])) is None:
        raise UnsupportedModelError(
            f"config.json names the architecture {config['architecture']!r}; expected one of {', '.join(_FAMILIES)}: "
            "save the model with dcvit."
        )
    per_layer_config = config["model_args"]["per_layer_config"]
    asked = {key for settings in per_layer_config.values() for key in settings}
    variants = {variation.__name__ for keys, variation in VARIATIONS.items() if asked.intersection(keys)}
    sources = [_source(module) for module in modules]
    trees = [ast.parse(source) for source in sources]
    statements = [one for tree, source in zip(trees, sources, strict=True) for one in _statements(tree, source)]
    reached = _reachable(statements, [one for one in statements if one.name is None or one.name in variants])
    used = {name for statement in reached for name in statement.uses}
    header = _HEADER.format(title=ast.get_docstring(trees[-1]))
    return "\n".join([header, _imports(trees, used), *_spaced(reached)])


def _source(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text(encoding="utf-8")


def _statements(tree: ast.Module, source: str) -> Iterator[_Statement]:
    """Yield the statements after a module's docstring, imports and `__all__`."""
    lines = source.splitlines()
    _, exports, *body = (node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom)))
    start = exports.end_lineno
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Expr):  # the docstring of the constant before it
            continue
        end = (after if isinstance(after, ast.Expr) else node).end_lineno
        names = frozenset(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
        yield _Statement(_defined(node), names, "\n".join(lines[start:end]).strip("\n"))
        start = end


def _defined(node: ast.stmt) -> str | None:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        assert isinstance(target, ast.Name)
        return target.id
    return None


def _reachable(statements: list[_Statement], roots: list[_Statement]) -> list[_Statement]:
    """Return the roots and all statements that they use, directly or indirectly, in source order."""
    by_name = {statement.name: statement for statement in statements if statement.name is not None}
    found, waiting = set(roots), list(roots)
    while waiting:
        new = {by_name[name] for name in waiting.pop().uses & by_name.keys()} - found
        found |= new
        waiting += new
    return [statement for statement in statements if statement in found]


def _imports(trees: Iterable[ast.Module], used: set[str]) -> str:
    """Return the import statements for the used names, without those from within dcvit."""
    modules: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names} & used
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("dcvit."):
            names.setdefault(node.module, set()).update({alias.name for alias in node.names} & used)
    sections: list[list[str]] = [[], []]  # standard library, third party
    for module in sorted(modules):
        sections[not _is_standard(module)].append(f"import {module}")
    for module in sorted(module for module, found in names.items() if found):
        sections[not _is_standard(module)].append(_import_from(module, names[module]))
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _import_from(module: str, names: Iterable[str]) -> str:
    # Constants first, then classes, then functions.
    ordered = sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    text = f"from {module} import {', '.join(ordered)}"
    if len(text) <= _LINE:
        return text
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"


def _spaced(statements: Iterable[_Statement]) -> Iterator[str]:
    """Yield the texts of statements, with one more blank line around functions and classes."""
    behind_block = False
    for statement in statements:
        yield ("\n" if statement.is_block or behind_block else "") + statement.text + "\n"
        behind_block = statement.is_block
