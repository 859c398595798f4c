"""Which structure meets a budget at the least loss."""
