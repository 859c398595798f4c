"""dcvit's own method: DC-ViT as published, and its extensions."""
