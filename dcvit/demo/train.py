"""Train the embedded model: `python -m dcvit.demo.train FOLDER`.

This script writes the model that ships with dcvit. It takes a few minutes on one core. It uses one thread, so that the
weights do not depend on the number of cores. On another processor or torch version, training amplifies rounding errors,
and the held-out accuracy differs by about a point.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcvit.artifacts.result import check_output_folder, save_model
from dcvit.demo.digits import IMAGE_SIZE, MEAN, NUM_TRAIN, STD, load_digits
from dcvit.metrics.agreement import top1
from dcvit.models import create_vision_transformer

ARCHITECTURE = {
    "img_size": IMAGE_SIZE,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 8,
    "num_heads": 4,
    # The original ViT initialisation. With timm's smaller one, the last blocks stay near the identity on such an easy
    # task. Dropping them would then cost nothing, and there would be nothing to compare.
    "weight_init": "jax",
}
PREPROCESSING = {"mean": [MEAN], "std": [STD], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
EPOCHS = 300
BATCH_SIZE = 125
LEARNING_RATE = 5e-4
WEIGHT_DECAY = 0.0


@dataclass(frozen=True)
class Training:
    """Settings of a classifier's training.

    Attributes:
        epochs: Passes over the examples.
        batch_size: Examples per step.
        learning_rate: The peak learning rate.
        weight_decay: AdamW's decoupled weight decay.
        report_every: Number of epochs between two printed lines.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    report_every: int


def train(epochs: int = EPOCHS, seed: int = 0) -> nn.Module:
    """Train a ViT on the training part of the digits, and return it in evaluation mode.

    Args:
        epochs: Passes over the 1000 images.
        seed: Seed of the initialisation, of the order of the images and of the augmentation.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    digits = load_digits()
    return fit_classifier(
        create_vision_transformer(ARCHITECTURE, PREPROCESSING),
        lambda chosen: (_moved(digits.train_images[chosen]), digits.train_labels[chosen]),
        NUM_TRAIN,
        Training(epochs, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, report_every=20),
    )


def fit_classifier(
    model: nn.Module,
    examples: Callable[[Tensor], tuple[Tensor, Tensor]],
    count: int,
    training: Training,
) -> nn.Module:
    """Train a classifier with AdamW in place, and return it in evaluation mode.

    The random numbers come from torch's global generator.

    Args:
        model: The classifier.
        examples: Maps indices `[B]` to preprocessed images `[B, C, H, W]` and their classes `[B]`.
        count: Number of examples.
        training: The settings.
    """
    epochs, batch_size, learning_rate = training.epochs, training.batch_size, training.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=training.weight_decay)
    steps = epochs * math.ceil(count / batch_size)
    step, start = 0, time.perf_counter()
    model.train()
    for epoch in range(epochs):
        for chosen in torch.randperm(count).split(batch_size):
            # The smaller of a linear warm-up over a tenth of the training and half a cosine.
            share = min((step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * share
            images, labels = examples(chosen)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        if (epoch + 1) % training.report_every == 0:
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


def _moved(images: Tensor) -> Tensor:
    """Return each image `[B, 1, 8, 8]` rotated by up to 0.15 rad, scaled by up to 10 %, shifted by up to 0.8 px."""
    count = len(images)
    angle, scale = (torch.rand(count) - 0.5) * 0.3, 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 0.4  # in units of half the image side
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(count, 2, 3)
    black = -MEAN / STD
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images - black, grid, align_corners=False) + black


def main() -> None:
    """Train the model, print its accuracy, and save it."""
    parser = argparse.ArgumentParser(prog="python -m dcvit.demo.train", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to save; empty or new")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    check_output_folder(arguments.folder)
    model = train(arguments.epochs)
    digits = load_digits()
    accuracy = top1(model, digits.test_images, digits.test_labels)
    save_model(model, arguments.folder)
    print(json.dumps({"top1": accuracy, "params": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
