"""The embedded model and its data: a small ViT pretrained on scikit-learn's handwritten digits.

`python -m dcvit.demo.train` trains the model that ships with dcvit. `dcvit demo` compresses it.
"""

from dcvit.demo.digits import Digits, load_digits

__all__ = ["Digits", "load_digits"]
