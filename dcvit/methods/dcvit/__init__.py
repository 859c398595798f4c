"""dcvit's own method: DC-ViT as published, and what goes beyond it."""
