"""Activation memory of one inference pass, at its peak.

It counts every tensor that the pass allocates, at the moment when those alive together are largest. Weights and the
input batch exist before and do not count. `trace_activation_memory` predicts it without computing anything: it runs the
model on tensors without data and adds up those that are alive. `measure_peak_memory` asks the allocator.

Both agree to the byte where blocks set the peak. The trace does not see what a kernel allocates for itself, such as the
copy of the weights that a CPU's convolution makes. That can set the peak of a batch of a few small images. For a fused
model the trace counts the plain modules; the compiled ops need less.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcvit.models import input_size, unfuse
from dcvit.models.surgery import pruned_skeleton

__all__ = ["measure_peak_memory", "trace_activation_memory"]


@torch.no_grad()
def trace_activation_memory(model: nn.Module, batch_size: int) -> int:
    """Return the peak bytes of the activations of one inference pass, from a run without data.

    Args:
        model: Any timm model; it is not changed.
        batch_size: Images in the pass.
    """
    weight = next(model.parameters())
    shadow = unfuse(pruned_skeleton(model, {}))
    with FakeTensorMode() as fake:
        # Its `state_dict` would leave out buffers that are not saved.
        tensors = [*shadow.named_parameters(), *shadow.named_buffers()]
        state: dict[str, Tensor] = {name: fake.from_tensor(tensor) for name, tensor in tensors}
        images = torch.empty(batch_size, *input_size(model), dtype=weight.dtype, device=weight.device)
        alive = _Alive()
        with alive:
            functional_call(shadow, state, (images,))
    return alive.peak


def measure_peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that a device's allocator in torch holds during a call, beyond what it held before.

    Args:
        run: The call.
        device: A CPU or an accelerator.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        run()
        torch.accelerator.synchronize(device)
        return int(torch.accelerator.max_memory_allocated(device)) - int(before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    results = profile.profiler.kineto_results
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class _Alive(TorchDispatchMode):
    """A dispatch mode that adds up the storages which operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(outputs):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in inputs and key not in self._sizes:  # else it is a view, or was written in place
                self._sizes[key] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, key)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return outputs


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
