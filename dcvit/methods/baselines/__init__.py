"""Published methods that dcvit is compared with, one module each."""
