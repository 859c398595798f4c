"""Step 3: the proxy set, made from the model itself.

Source: DC-ViT (arXiv 2403.18708), after DeepInversion (arXiv 1912.08795). Starting from Gaussian noise with target
classes y, minimise

    CE(M_O(x), y) + R(x)

where the prior R is an L2 term and the total variation of four difference images (`dcvit.ops.tv_prior`). The prior is
computed on the images themselves, and the cross-entropy on a jittered view. Rolling and mirroring would not change the
prior, except in the rows that a roll joins.

A model with BatchNorm stores the mean and variance of what each of these norms saw in training. DeepInversion's prior
compares them with those of the view (`bn_prior`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcvit.config import SynthesisConfig
from dcvit.context import STANDALONE, RunContext
from dcvit.models import compressible, preprocessing, require_supported
from dcvit.models.pseudo_head import class_logits, num_classes
from dcvit.models.surgery import copy_blocks
from dcvit.ops import synthesis_step
from dcvit.runtime.checkpoint import require_alike
from dcvit.runtime.optim import warmup_cosine
from dcvit.runtime.process_state import own_state

__all__ = ["FIRST_BN_WEIGHT", "ProxySet", "bn_prior", "require_synthesized", "synthesize"]

FIRST_BN_WEIGHT = 10.0
"""Weight of the first BatchNorm relative to the others (DeepInversion's code)."""


@dataclass(frozen=True)
class ProxySet:
    """Images on which candidates are compared.

    Attributes:
        images: Normalised, `[M, C, H, W]`.
        targets: The classes that the images were made for, `[M]`; `None` if they were not synthesised.
        loss: The lowest value of the objective; NaN if the images were not synthesised.
        losses: The objective at each iteration; empty if the images were not synthesised.
    """

    images: Tensor
    targets: Tensor | None = None
    loss: float = float("nan")
    losses: tuple[float, ...] = ()

    def to(self, device: str | torch.device) -> "ProxySet":
        """Return the proxy set on another device."""
        return replace(
            self, images=self.images.to(device), targets=None if self.targets is None else self.targets.to(device)
        )


@own_state()
def synthesize(
    model: nn.Module,
    config: SynthesisConfig | None = None,
    context: RunContext = STANDALONE,
) -> ProxySet:
    """Make images that the model assigns to given classes.

    A model without classes is inverted through the random projection of `dcvit.models.pseudo_head`.

    Args:
        model: The original model M_O, in evaluation mode with frozen weights; it is not changed.
        config: Settings of the optimisation.
        context: Its seed draws targets, noise and jitter; its progress is called after each iteration.

    Returns:
        The images of the iteration with the lowest loss, inside the valid pixel range.
    """
    config = config or SynthesisConfig()
    model = copy_blocks(require_supported(model).model, ())  # the copy gets the hooks, and the caller's model none
    view = compressible(model)
    parameter = next(model.parameters())
    channels, height, width = view.input_size()
    low, high = (bound.to(parameter) for bound in preprocessing(model).pixel_range)
    rolls = round(config.jitter * height), round(config.jitter * width)

    has_bn = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    micro_batch_size = config.num_images if has_bn else config.micro_batch_size

    drawing = context.generator("synthesis")
    with _bn_inputs(model) as bn_inputs:
        shape = (config.num_images, channels, height, width)
        # Drawn on the CPU, so that a seed means the same images on every device.
        images = torch.randn(shape, generator=drawing, dtype=torch.float32).to(parameter)
        images.clamp_(low.view(-1, 1, 1), high.view(-1, 1, 1))
        targets = torch.randint(num_classes(model), (config.num_images,), generator=drawing).to(parameter.device)
        exp_avg, exp_avg_sq = torch.zeros_like(images), torch.zeros_like(images)
        best, best_loss = images.clone(), float("inf")
        losses: list[float] = []
        context.progress("synthesis", 0, config.iterations, None)
        for iteration in range(config.iterations):
            shifts = tuple(int(torch.randint(-roll, roll + 1, (), generator=drawing)) for roll in rolls)
            mirrored = float(torch.rand((), generator=drawing, dtype=torch.float32)) < config.flip
            gradients, of_views = [], 0.0
            for part, of_part in zip(images.split(micro_batch_size), targets.split(micro_batch_size), strict=True):
                seen = part.detach().requires_grad_(True)
                jittered = seen.roll(shifts, dims=(2, 3))
                jittered = jittered.flip(3) if mirrored else jittered
                bn_inputs.clear()
                of_view = F.cross_entropy(class_logits(model, view.tokens(jittered)), of_part)
                if bn_inputs:
                    of_view = of_view + config.bn_weight * bn_prior(bn_inputs)
                of_view = len(part) / len(images) * of_view
                gradients += torch.autograd.grad(of_view, seen)
                of_views += float(of_view.detach())
            before = images.clone()
            rate = config.learning_rate * warmup_cosine(iteration, config.iterations, config.warmup_iterations)
            prior = synthesis_step(
                images,
                torch.cat(gradients),
                exp_avg,
                exp_avg_sq,
                step=iteration + 1,
                lr=rate,
                betas=config.betas,
                beta=view.tv_exponent if config.tv_exponent is None else config.tv_exponent,
                tv_weight=config.tv_weight,
                l2_weight=config.l2_weight,
                low=low,
                high=high,
                impl=context.impl,
            )
            loss = of_views + float(prior)
            losses.append(loss)
            if loss < best_loss:
                best, best_loss = before, loss
            context.progress("synthesis", iteration + 1, config.iterations, loss)
    return ProxySet(best, targets, best_loss, tuple(losses))


def require_synthesized(found: ProxySet, model: nn.Module, config: SynthesisConfig) -> None:
    """Refuse a proxy set that `synthesize` could not have made.

    Args:
        found: The proxy set, which must have targets.
        model: The original model.
        config: Settings of the optimisation.

    Raises:
        ValueError: If it could not.
    """
    assert found.targets is not None
    parameter, (channels, height, width) = next(model.parameters()), require_supported(model).input_size()
    images = parameter.new_empty(config.num_images, channels, height, width, device="meta")
    targets = torch.empty(config.num_images, dtype=torch.int64, device="meta")
    require_alike({"images": found.images, "targets": found.targets}, {"images": images, "targets": targets})
    low, high = (bound.to(found.images).view(-1, 1, 1) for bound in preprocessing(model).pixel_range)
    if not bool(((low <= found.images) & (found.images <= high)).all()):
        raise ValueError("its images have pixels outside of the valid range")
    if not bool(((found.targets >= 0) & (found.targets < num_classes(model))).all()):
        raise ValueError(f"its targets are not among the model's {num_classes(model)} classes")
    if len(found.losses) != config.iterations or found.loss not in found.losses:
        raise ValueError(f"it has {len(found.losses)} iterations and a loss of {found.loss}")


def bn_prior(inputs: list[tuple[nn.BatchNorm2d, Tensor]]) -> Tensor:
    """Return how far the inputs of a model's BatchNorms are from the norms' running statistics.

    This is Σ ‖mean − running mean‖₂ + ‖variance − running variance‖₂ over the norms, where the first one counts
    `FIRST_BN_WEIGHT` times (DeepInversion, arXiv 1912.08795, equation 4).

    Args:
        inputs: Each norm and its input `[B, D, H, W]`, in the order of the model.
    """
    total = inputs[0][1].new_zeros(())
    for number, (norm, features) in enumerate(inputs):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        variance, mean = torch.var_mean(features, dim=(0, 2, 3), correction=0)
        distance = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()
        total = total + (FIRST_BN_WEIGHT if number == 0 else 1.0) * distance
    return total


@contextmanager
def _bn_inputs(model: nn.Module) -> Iterator[list[tuple[nn.BatchNorm2d, Tensor]]]:
    """Yield a list to which each pass appends the model's BatchNorms and their inputs."""
    inputs: list[tuple[nn.BatchNorm2d, Tensor]] = []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    handles = [norm.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0]))) for norm in norms]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
