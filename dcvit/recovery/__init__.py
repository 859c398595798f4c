"""How a compressed model gets back what it lost: ridge regression, reconstruction, distillation, fine-tuning."""
