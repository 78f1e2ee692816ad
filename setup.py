"""Build script; everything about the package that needs no code is in pyproject.toml."""

from setuptools import setup

setup()
