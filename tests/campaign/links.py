"""A link between two network namespaces that is cut while a rank in each trains or saves: both end
with a sentence, in time, and the same command goes on to the bit once the link is back.

    python tests/campaign/links.py --cuts 4 --seed 1          (as root; needs iproute2)
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

from campaign.faults import (  # noqa: E402
    ENDS,
    TIMEOUT,
    Fault,
    armed,
    emptied,
    sentences,
)
from campaign.kills import differences  # noqa: E402

ADDRESSES = ("10.213.77.1", "10.213.77.2")
CARD = "puna0"  # what each end of the link is called


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Link:
    """Two namespaces and the link between them; cut for good where it is not mended."""

    def __init__(self) -> None:
        self.names = [f"puna-{os.getpid()}-{rank}" for rank in (0, 1)]

    def lay(self) -> None:
        """OSError where this process may not, or has no iproute2."""
        one, two = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("-n", one, "link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", two)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CARD)
            ip("-n", name, "link", "set", "lo", "up")
        self.mend()

    def mend(self) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", CARD, "up")

    def cut(self, rank: int) -> None:
        """Take down the card of this rank."""
        ip("-n", self.names[rank], "link", "set", CARD, "down")

    def take_up(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextmanager
def laid() -> Iterator[Link]:
    """A link, for the time of the block; OSError where there cannot be one."""
    link = Link()
    try:
        link.lay()
        yield link
    finally:
        link.take_up()


def start(link: Link, code: str) -> list[subprocess.Popen]:
    """A rank in each namespace."""
    processes = []
    for rank, name in enumerate(link.names):
        names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 29500}
        names |= {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": CARD}
        environment = os.environ | {key: str(value) for key, value in names.items()}
        command = ["ip", "netns", "exec", name, sys.executable, "-c", code]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    return processes


def finish(processes: list[subprocess.Popen]) -> None:
    """AssertionError where one does not end well."""
    ends = [process.wait(300) for process in processes]
    if any(ends):
        raise AssertionError(f"ranks ended with {ends}")


def cut(
    link: Link, fault: Fault, tiny: Path, out: Path, notes: Path, card: int
) -> tuple[str, float, list[str]]:
    """Run until the link is cut at the card of a rank: (where that hit, or "" where the run ended
    before; seconds from then to the end of both; what is wrong with the ends)."""
    processes = start(link, armed(fault, tiny, out, emptied(notes)))
    try:
        while not (hit := [name for name in ("inside", "after") if (notes / name).exists()]):
            if all(process.poll() is not None for process in processes):
                return "", 0.0, []
            time.sleep(0.002)
        link.cut(card)
        began, wrong = time.monotonic(), []
        for rank, process in enumerate(processes):
            try:
                left = began + TIMEOUT + ENDS - time.monotonic()
                if (status := process.wait(max(left, 0.1))) != 1:
                    wrong.append(f"rank {rank} ended with {status}")
            except subprocess.TimeoutExpired:
                wrong.append(f"rank {rank} hangs")
            said, found = sentences(notes, rank)
            if len(found) != 1:
                wrong.append(f"rank {rank} said {said!r}")
        return hit[0], time.monotonic() - began, wrong
    finally:
        for process in processes:
            process.kill()
            process.wait()
        link.mend()


def campaign(cuts: int, seed: int) -> int:
    from tiny import make_tiny

    root = Path(tempfile.mkdtemp(prefix="links-"))
    tiny = make_tiny(Path(tempfile.mkdtemp(prefix="tiny-", dir=root)))
    notes, bad = root / "notes", 0
    with laid() as link:
        for moment in ("step", "write"):
            whole, out = root / f"whole-{moment}", root / "run"
            finish(start(link, armed(Fault(moment), tiny, whole, emptied(notes))))
            times = (notes / "times-0").stat().st_size
            for turn in range(cuts):
                rng = random.Random(f"{seed} {moment} {turn}")
                fault = Fault(
                    moment, turn % 2, rng.randint(1, times // 2), rng.uniform(0, 1), "cut"
                )
                hit, seconds, wrong = cut(link, fault, tiny, out, notes, rng.randrange(2))
                finish(start(link, armed(Fault(moment), tiny, out, emptied(notes))))
                wrong += differences(out, whole)
                bad += bool(wrong)
                print(f"{moment}: {hit or 'not'} hit, {seconds:.1f} s, {wrong}", flush=True)
                shutil.rmtree(out)
    if not bad:
        shutil.rmtree(root)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=4, help="in a step; and as many in a write")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    return 1 if campaign(given.cuts, given.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
