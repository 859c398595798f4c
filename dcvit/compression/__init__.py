"""The functions `compress` and `sweep`, and the steps that every run begins and ends with."""
