"""The few-shot images: loading, augmentation, and synthesis from the model itself."""
