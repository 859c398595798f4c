"""scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, from the UCI repository."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcvit.errors import DcvitError

__all__ = ["IMAGE_SIZE", "MEAN", "NUM_TRAIN", "STD", "Digits", "load_digits"]

IMAGE_SIZE = 8
MEAN, STD = 0.305, 0.376
"""Mean and standard deviation of the pixels, scaled to [0, 1]."""

NUM_TRAIN = 1000
"""Number of images that the embedded model was trained on. Few-shot sets are drawn from them; 797 are held out."""


@dataclass(frozen=True)
class Digits:
    """Normalised images `[N, 1, 8, 8]` and labels `[N]`, in a fixed split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def few_shot(self, num_images: int, seed: int) -> Tensor:
        """Return a random selection of training images without labels, `[num_images, 1, 8, 8]`.

        Raises:
            DcvitError: If `num_images` is less than 1 or more than there are.
        """
        if not 1 <= num_images <= len(self.train_images):
            raise DcvitError(f"num_images={num_images}: expected 1 to {len(self.train_images)}.")
        order = torch.randperm(len(self.train_images), generator=torch.Generator().manual_seed(seed))
        return self.train_images[order[:num_images]]


def load_digits() -> Digits:
    """Load the digits.

    Raises:
        DcvitError: If scikit-learn, which contains them, is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DcvitError("The digits come with scikit-learn: pip install 'dcvit[demo]'.") from error
    data = datasets.load_digits()
    images = (torch.from_numpy(data.images).float() / 16 - MEAN) / STD
    labels = torch.from_numpy(data.target).long()
    # The images are ordered by writer. A fixed shuffle spreads the writers over both parts.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order, None], labels[order]
    return Digits(images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:])
