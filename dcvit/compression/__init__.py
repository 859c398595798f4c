"""`compress` and `sweep`, and what every run begins and ends with."""
