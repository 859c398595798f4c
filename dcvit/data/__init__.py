"""Images: the few-shot set and its augmentation, and the proxy set made from the model itself."""
