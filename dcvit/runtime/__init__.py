"""The infrastructure of a run: processes, checkpoints, seeds, precision, progress and files."""
