"""Recovery of a compressed model: ridge regression, block reconstruction, distillation and fine-tuning."""
