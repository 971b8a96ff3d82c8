"""The package map and the extension: what pyproject cannot say.

Each room at the root is a subpackage of `puna`. Without a C++ compiler the installation goes on
and the extension is missing: Puna then says so once and works without it.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

ROOMS = ("kernels", "core", "trainers", "demo", "annotate", "cli", "recipes", "benchmarks")

# No -march: the instruction set is chosen when the program runs, so one wheel serves all machines.
native = Pybind11Extension(
    "puna.core._C",
    sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=fast", "-fopenmp", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

packages = ["puna", *(f"puna.{room}" for room in ROOMS)]
packages += [f"puna.{room}.{inner}" for room in ROOMS for inner in find_packages(room)]

setup(
    ext_modules=[native],
    packages=packages,
    package_dir={f"puna.{room}": room for room in ROOMS},
    package_data={
        **{f"puna.{room}": ["py.typed"] for room in ROOMS},
        "puna": ["py.typed"],
        "puna.annotate": ["py.typed", "pages/*.html", "static/*"],
        "puna.kernels": ["py.typed", "README.md", "LICENSE"],
        "puna.recipes": ["py.typed", "*.toml", "*/*.toml"],
    },
)
