"""Everything that is not compiled stands in pyproject.toml."""

from setuptools import setup

setup()
