"""Search of the structure that meets a budget with the smallest loss."""
