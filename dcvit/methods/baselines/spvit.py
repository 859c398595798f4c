"""SPViT: replace some attentions by convolutions that share their weights, and prune hidden units, by learnt gates.

Source: He, Liu, Pan, Cai, Zhang, Tao and Zhuang, "Pruning Self-attentions into Convolutional Layers in Single Path"
(arXiv 2111.11802). The value and output projections of an attention also contain those of a convolution, so one path
serves both. A gate blends g times the attention and 1 − g times the convolution. Hidden units of MLPs have gates as
well. The gates are trained to minimise

    L + λ · cost of all open gates

Then the groups with closed gates are removed, and the rest is trained.

Choices and differences of this implementation:

- The paper's convolution blends the heads by learnt weights into one of a head's width, with BatchNorm and ReLU, and
  leaves the class token unchanged. Training makes up for that, but a few images cannot. Here all channels stay. Each
  has its own 3×3 kernel, a weight of the mean over all tokens and a constant; the prefix tokens have such weights too
  (`ConvolutionalAttention`). These are fitted by least squares to the original's attention before its output
  projection. The paper also chooses among 1×1 kernels and no mixing; here these are kernels with zeros.
- The paper draws the gates from Bernoulli distributions, and trains them with the weights on labelled ImageNet. Here
  gates are factors, as in `vtp`, and only the gates are trained, on the few-shot images. L is the distillation loss
  relative to the tokens' variance. The cost is in the budget's metric, as a share of the cost of all groups.
- The budget determines how many gates close, smallest first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcvit.methods.baselines.distillation import DistilledConfig
from dcvit.methods.baselines.groups import Space, recovered, scores_of
from dcvit.methods.baselines.vtp import learn_gates
from dcvit.methods.registry import Method, Outcome, Task, register
from dcvit.models import compressible
from dcvit.models.modeling.shared import TimmModule
from dcvit.models.modeling.variations import KERNEL, ConvolutionalAttention

__all__ = ["SPARSITY", "Equations", "SPViT", "fit_convolutions", "spvit"]

SPARSITY = 0.1
"""λ, which weighs a cost of 1 with all gates open. The loss is 1 for a student that knows only the mean token."""

IMAGES = 4
"""Number of images that are summed at a time, in float64."""

TAPS = KERNEL**2

RELATIVE_RANK = 1e-10
"""A solution leaves out directions whose eigenvalues are below this share of the largest."""


@dataclass(frozen=True)
class SPViT(DistilledConfig):
    """Settings of SPViT (arXiv 2111.11802): attentions become convolutions, and hidden units are pruned."""


def spvit(task: Task[SPViT]) -> Outcome:
    """Replace some attentions by convolutions, prune hidden units, and train the rest by distillation.

    Args:
        task: The model, the images, the budget and the settings.

    Raises:
        BudgetError: If the budget cannot be met.
        UnsupportedModelError: If the model's tokens do not form a grid.
    """
    teacher, distillation = task.teacher, task.config.distillation
    space = Space(teacher, task.config.candidates, ("attention", "unit"))
    space.require(task.budget)
    with task.context.timer("ranking"):
        batches = task.images.normalised.split(distillation.batch_size)
        fit_convolutions(teacher, space.convolutions, task.images.normalised.split(distillation.micro_batch_size))
        prices = space.savings(task.budget)
        gates = learn_gates(
            space,
            batches,
            sparsity=SPARSITY,
            prices=prices,
            micro_batch_size=distillation.micro_batch_size,
            progress=task.context.progress,
        )
        structure = space.best(scores_of(gates), task.budget)
    return recovered(task, space, structure)


register(
    Method(
        name="spvit",
        config=SPViT,
        title="attentions made convolutions and hidden units pruned, by learnt gates, then the output tokens distilled",
        source="SPViT, arXiv 2111.11802",
        families=("vit",),
        compress=spvit,
    )
)


@dataclass
class Equations:
    """Sums over equations Σ_i w_i x_i = y, for many unknown w at once, in float64.

    Attributes:
        gram: Σ xxᵀ `[..., K, K]`.
        moment: Σ xy `[..., K]`.
    """

    gram: Tensor | float = 0.0
    moment: Tensor | float = 0.0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows of inputs `[R, ..., K]` and targets `[R, ...]`."""
        inputs, targets = inputs.double(), targets.double()
        self.gram = self.gram + torch.einsum("r...i,r...j->...ij", inputs, inputs)
        self.moment = self.moment + torch.einsum("r...i,r...->...i", inputs, targets)

    def solve(self) -> Tensor:
        """Return the least-squares solution w of smallest norm, `[..., K]`."""
        gram, moment = torch.as_tensor(self.gram), torch.as_tensor(self.moment)
        inverse = torch.linalg.pinv(gram, rtol=RELATIVE_RANK, hermitian=True)
        solution: Tensor = inverse @ moment.unsqueeze(-1)
        return solution.squeeze(-1)


@torch.no_grad()
def fit_convolutions(
    model: nn.Module, convolutions: Mapping[int, ConvolutionalAttention], batches: Iterable[Tensor]
) -> None:
    """Fit convolutions in place to the outputs of the attentions they replace, before the attentions' norm.

    Args:
        model: The original.
        convolutions: The convolutions, by block.
        batches: Batches of images, `[B, C, H, W]` each.
    """
    view = compressible(model)
    sums = {block: (Equations(), Equations()) for block in convolutions}
    with ExitStack() as watched:
        for block, convolution in convolutions.items():
            module: TimmModule = view.block(block)
            watched.enter_context(_watched(module.attn, partial(_add, convolution, *sums[block])))
        for images in batches:
            view.tokens(images)
    for block, convolution in convolutions.items():
        patches, prefix = (equations.solve() for equations in sums[block])
        convolution.conv.weight.copy_(patches[:, :TAPS].view_as(convolution.conv.weight))
        convolution.mean.copy_(patches[:, TAPS])
        convolution.conv.bias.copy_(patches[:, TAPS + 1])
        convolution.prefix.copy_(prefix.permute(2, 0, 1))


@contextmanager
def _watched(attn: TimmModule, see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see` with the values and the attended values, `[B, N, C]` both, whenever a timm `Attention` runs."""
    values: list[Tensor] = []
    with (
        attn.qkv.register_forward_hook(lambda _, inputs, qkv: values.append(qkv.chunk(3, dim=-1)[2])),
        attn.norm.register_forward_pre_hook(lambda _, inputs: see(values.pop(), inputs[0])),
    ):
        yield


def _add(
    convolution: ConvolutionalAttention, patches: Equations, prefix: Equations, values: Tensor, mixed: Tensor
) -> None:
    """Add equations of a convolution's patches and prefix tokens. Unknowns have the order of `fit_convolutions`."""
    for value, target in zip(values.split(IMAGES), mixed.split(IMAGES), strict=True):
        own, grid = convolution.split(value)
        mean = value.mean(dim=1, keepdim=True)
        taps = F.unfold(grid, KERNEL, padding=KERNEL // 2).unflatten(1, (-1, TAPS)).permute(0, 3, 1, 2)  # [B, P, C, K²]
        shared = mean.unsqueeze(-1).expand(*taps.shape[:3], 1)
        inputs = torch.cat([taps, shared, torch.ones_like(shared)], dim=-1)
        patches.add(inputs.flatten(0, 1), target[:, own.shape[1] :].flatten(0, 1))
        inputs = torch.stack([own, mean.expand_as(own), torch.ones_like(own)], dim=-1)  # [B, T, C, 3]
        prefix.add(inputs, target[:, : own.shape[1]])
