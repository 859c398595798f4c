"""Published methods to compare with, one module each."""
