"""What is measured of models: latency, memory, fidelity to the original."""
