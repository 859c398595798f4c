"""What a compression leaves behind: saved folders, model cards, exports, the hub."""
