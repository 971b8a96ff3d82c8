"""The package map: each room at the root is a subpackage of `puna` (the rest is in pyproject)."""

from setuptools import setup

ROOMS = ("kernels", "core", "trainers", "demo", "cli", "recipes", "benchmarks")

setup(
    packages=[f"puna.{room}" for room in ROOMS],
    package_dir={f"puna.{room}": room for room in ROOMS},
    package_data={
        **{f"puna.{room}": ["py.typed"] for room in ROOMS},
        "puna.kernels": ["py.typed", "README.md", "LICENSE"],
        "puna.recipes": ["py.typed", "*.toml", "*/*.toml"],
    },
)
