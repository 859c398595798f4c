"""SPViT: some attentions become convolutions that share their weights, and hidden units go, by learnt gates.

Source: He, Liu, Pan, Cai, Zhang, Tao and Zhuang, "Pruning Self-attentions into Convolutional Layers in Single Path"
(arXiv 2111.11802). Value and output projections of an attention hold those of a convolution too, so that one path
serves both and a gate chooses: g of attention, 1 − g of convolution; hidden units of MLPs have gates as well. The gates
learn under

    L + λ · cost of what is open

then what is closed goes, and the rest is trained.

As it is applied here:

- The paper's convolution blends the heads by learnt weights into one as wide as a head, with BatchNorm and ReLU, and
  leaves the class token as it is; training makes up for that. Few images cannot, so all channels stay and each has its
  own 3×3 kernel, a share of the mean over all tokens and a constant, the prefix tokens shares likewise
  (`ConvolutionalAttention`). They are fitted by least squares to what the original's attention gives before its output
  projection. 1×1 kernels and no mixing at all, which the paper chooses among too, are kernels of zeros.
- The paper draws the gates from Bernoulli distributions, and trains them with the weights on labelled ImageNet. Here
  they are numbers that multiply, as in `vtp`, and the gates alone learn, on the few-shot images; L is the distillation
  loss, as a share of the tokens' variance. The cost is in the budget's unit, as a share of that of all units.
- What is closed is what the budget asks for, smallest gates first.
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
"""λ, on a cost of 1 where all is open, beside a loss that is 1 where a student knows no more than the mean token."""

IMAGES = 4
"""So many are summed at a time, in float64."""

TAPS = KERNEL**2

RELATIVE_RANK = 1e-10
"""Directions of smaller eigenvalues, as shares of the largest, are left out of a solution."""


@dataclass(frozen=True)
class SPViT(DistilledConfig):
    """SPViT (arXiv 2111.11802): attentions become convolutions, and hidden units go."""


def spvit(task: Task[SPViT]) -> Outcome:
    """Let convolutions take the place of some attentions, prune units, and let the rest mimic the original.

    Args:
        task: What to compress, with what, to which budget.

    Raises:
        BudgetError: If the budget cannot be met.
        UnsupportedModelError: If the model's tokens are no grid.
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
        title="attentions become convolutions and hidden units go, by learnt gates, then the output tokens mimicked",
        source="SPViT, arXiv 2111.11802",
        families=("vit",),
        compress=spvit,
    )
)


@dataclass
class Equations:
    """Sums over equations Σ_i w_i x_i = y, of many unknown w at once, in float64.

    Attributes:
        gram: Σ xxᵀ `[..., K, K]`.
        moment: Σ xy `[..., K]`.
    """

    gram: Tensor | float = 0.0
    moment: Tensor | float = 0.0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Some rows more: inputs `[R, ..., K]` and targets `[R, ...]`."""
        inputs, targets = inputs.double(), targets.double()
        self.gram = self.gram + torch.einsum("r...i,r...j->...ij", inputs, inputs)
        self.moment = self.moment + torch.einsum("r...i,r...->...i", inputs, targets)

    def solve(self) -> Tensor:
        """The least squares' w of smallest norm `[..., K]`."""
        gram, moment = torch.as_tensor(self.gram), torch.as_tensor(self.moment)
        inverse = torch.linalg.pinv(gram, rtol=RELATIVE_RANK, hermitian=True)
        solution: Tensor = inverse @ moment.unsqueeze(-1)
        return solution.squeeze(-1)


@torch.no_grad()
def fit_convolutions(
    model: nn.Module, convolutions: Mapping[int, ConvolutionalAttention], batches: Iterable[Tensor]
) -> None:
    """In place: the mixing weights by which convolutions come closest to what attentions give, before their norm.

    Args:
        model: The original.
        convolutions: By block.
        batches: Images, `[B, C, H, W]` each.
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
    """Show values and what is mixed of them, `[B, N, C]` both, whenever a timm `Attention` runs."""
    values: list[Tensor] = []
    with (
        attn.qkv.register_forward_hook(lambda _, given, qkv: values.append(qkv.chunk(3, dim=-1)[2])),
        attn.norm.register_forward_pre_hook(lambda _, given: see(values.pop(), given[0])),
    ):
        yield


def _add(
    convolution: ConvolutionalAttention, patches: Equations, prefix: Equations, values: Tensor, mixed: Tensor
) -> None:
    """More equations of a convolution's patches and prefix tokens, the unknowns in the order of `fit_convolutions`."""
    for value, wanted in zip(values.split(IMAGES), mixed.split(IMAGES), strict=True):
        own, grid = convolution.split(value)
        mean = value.mean(dim=1, keepdim=True)
        taps = F.unfold(grid, KERNEL, padding=KERNEL // 2).unflatten(1, (-1, TAPS)).permute(0, 3, 1, 2)  # [B, P, C, K²]
        shared = mean.unsqueeze(-1).expand(*taps.shape[:3], 1)
        inputs = torch.cat([taps, shared, torch.ones_like(shared)], dim=-1)
        patches.add(inputs.flatten(0, 1), wanted[:, own.shape[1] :].flatten(0, 1))
        inputs = torch.stack([own, mean.expand_as(own), torch.ones_like(own)], dim=-1)  # [B, T, C, 3]
        prefix.add(inputs, wanted[:, : own.shape[1]])
