"""Hands the native build to CMake; everything else stands in pyproject.toml."""

from setuptools import setup

setup(cmake_source_dir=".")
