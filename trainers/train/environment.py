"""On what machine, with what versions and from which commit a run was started."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from puna.core import parallel


def environment() -> dict[str, Any]:
    """Versions and machine: what is needed to judge or to repeat a run's numbers."""
    packages = ("torch", "triton", "numpy", "sentencepiece", "safetensors")
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": found,
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": parallel.world_size(),
        "commit": _commit(),
        "arguments": sys.argv[1:],
    }


def _commit() -> str | None:
    """The commit of the source tree that this file belongs to; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None
