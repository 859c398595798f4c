"""No function takes too much, and the longest of the past stay short."""

from dataclasses import fields

import pytest

from dcvit.context import RunContext
from tests.tooling.figures import MOST_PARAMETERS, functions, modules
from tests.tooling.test_floors import ROOT

FUNCTIONS = {function.name: function for function in functions(modules(ROOT))}

OUTSIDE = [f for f in FUNCTIONS.values() if not f.name.startswith(("dcvit.ops.", "dcvit.cli."))]

ALLOWED = {
    "dcvit.compression.compress.compress": "users name its arguments one by one, and most calls name three",
    "dcvit.models.modeling.vision_transformer.build": "its arguments are the fields of a saved `config.json`",
    "dcvit.models.modeling.eva.build": "its arguments are the fields of a saved `config.json`",
    "dcvit.models.modeling.swin.build": "its arguments are the fields of a saved `config.json`",
    "dcvit.models.modeling.cnn.build": "its arguments are the fields of a saved `config.json`",
}
"""Functions of more parameters, each with the reason."""


def test_few_parameters_outside_of_ops_and_cli() -> None:
    """What ops take is their schema, and a command's function takes what the command line has."""
    assert {f.name for f in OUTSIDE if f.parameters > MOST_PARAMETERS} == ALLOWED.keys()


def test_what_travels_together_is_one_context() -> None:
    """Only `compress`, which makes the context, takes several of its fields by themselves."""
    shared = {field.name for field in fields(RunContext)}
    assert {f.name for f in OUTSIDE if len(shared & set(f.names)) > 1} == {"dcvit.compression.compress.compress"}


@pytest.mark.parametrize(
    "name",
    [
        "dcvit.recovery.reconstruct.reconstruct_block",
        "dcvit.recovery.finetune.refine",
        "dcvit.methods.dcvit.published.compress_blocks",
        "dcvit.methods.dcvit.reconstructed.reconstruct_blocks",
    ],
)
def test_the_heart_of_each_procedure_is_short(name: str) -> None:
    """Its docstring included."""
    assert FUNCTIONS[name].lines <= 40
