"""Measurements of models: latency, memory, cost, accuracy, and fidelity to the original."""
