"""Models that are built on the meta device."""

from typing import Any

import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcvit.models.building import Building, without_values
from tests.variants import SMALL


class Counter(TorchDispatchMode):
    """Counts the operations that set values in place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.in_place = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.in_place += func._schema.name.endswith("_")
        return func(*args, **(kwargs or {}))


def test_a_model_without_values_is_not_initialised() -> None:
    """It has the parameters and buffers of the initialised one; what is on another device still gets its values."""
    expected = timm.create_model("vit_tiny_patch16_224", **SMALL)
    before = torch.get_rng_state()
    for mode in (without_values(), Building()):
        counter = Counter()
        with counter, torch.device("meta"), mode:
            model = timm.create_model("vit_tiny_patch16_224", **SMALL)
            on_cpu = torch.ones(3, device="cpu").mul_(2)
        assert counter.in_place == 1
        assert on_cpu.tolist() == [2, 2, 2]
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (model, expected)]
        assert shapes[0] == shapes[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_changes_a_shape_in_place_is_run() -> None:
    with without_values():
        assert torch.zeros(2, 3).t_().shape == (3, 2)
        assert torch.zeros(2, 3).resize_(4).shape == (4,)
