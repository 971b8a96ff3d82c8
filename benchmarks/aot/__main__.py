"""`python -m puna.benchmarks.aot`: see `run`."""

import sys

import tyro

from puna.benchmarks.aot.run import run

if __name__ == "__main__":
    sys.exit(tyro.cli(run))
