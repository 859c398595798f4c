"""Artifacts of a compression: saved folders, model cards, exported files and uploads to the hub."""
