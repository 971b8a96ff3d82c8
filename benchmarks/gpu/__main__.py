"""`python -m puna.benchmarks.gpu`: see `run`."""

import sys

import tyro

from puna.benchmarks.gpu.run import run
from puna.core.errors import UserError
from puna.core.terminal import say

if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(run))
    except (ValueError, UserError) as error:
        say(f"puna.benchmarks.gpu: {error}", error=True)
        sys.exit(1)
    except KeyboardInterrupt:
        say("stopped; the same command goes on", error=True)
        sys.exit(130)
