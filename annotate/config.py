"""What the page is served with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from puna.trainers.data.columns import Columns, ReadingComparisons, ReadingMessages
from puna.trainers.train.ranges import (
    AtMost,
    Batch,
    Count,
    CountOrZero,
    Options,
    Seed,
    Share,
    Temperature,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class AnnotateConfig(ReadingMessages):
    """Serve the page where people compare two answers of two models (paper section 3.2.1)."""

    out: Path
    """file of comparisons (SQLite), made where there is none; comparisons that wait in it, such as
    those of puna rlhf --annotations, are served too"""
    models: list[Path] = field(default_factory=list)
    """the two newest chat models, whose answers are compared; one alone is compared with itself;
    left out: only what waits in the file is served"""
    prompts: list[Path] = field(default_factory=list)
    """prompt files; those with `safety` true are compared for safety, the others for helpfulness"""
    batch: Count = 1
    """number of the batch (paper: a week) that these comparisons belong to"""
    pairs: CountOrZero = 0
    """comparisons in the batch; 0: one for each prompt"""
    overlap: Share = 0.0
    """share of the comparisons that two people make, to measure how far they agree"""
    turns: Count = 1
    """most exchanges in a dialogue; above 1 the chosen answer can be replied to"""
    temperatures: list[Temperature] = field(default_factory=lambda: [0.8, 1.0, 1.2])
    """each answer is drawn at one of these"""
    max_new_tokens: Count = 256
    """longest answer, tokens"""
    ahead: Batch = 32
    """comparisons whose answers are sampled before anybody asks for them"""
    annotators: list[str] = field(default_factory=list)
    """names of the people who compare: each gets an address with a token, shown once; needed for
    any host but this machine"""
    renew: bool = False
    """give the people named a new address; the old one ends"""
    helpfulness_guidelines: Path | None = None
    """Markdown file that is shown with helpfulness comparisons"""
    safety_guidelines: Path | None = None
    """the same for safety comparisons"""
    helpfulness_reward: Path | None = None
    """newest reward model of helpfulness: how often it orders the answers as people do stands on
    the dashboard, for comparisons made after it was written"""
    safety_reward: Path | None = None
    """the same of safety"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 is every address of this machine"""
    names: list[str] = field(default_factory=list)
    """further host names under which people reach it, such as that of a proxy"""
    port: Annotated[Count, AtMost(65535)] = 8765
    seed: Seed = 0
    device: str = "auto"
    """auto takes a GPU where there is one"""

    def check(self) -> None:
        if not self.temperatures:
            raise ValueError("temperatures is empty; name one at least")
        if self.host not in LOOPBACK and not self.annotators:
            raise ValueError(
                f"host {self.host} is open to others; name with --annotators who may come in"
            )
        for name in self.annotators:
            if not name.strip() or len(name) > 60:
                raise ValueError(f"annotators has {name!r}, expected a name of 1 to 60 characters")
        if "owner" in self.annotators:
            raise ValueError("annotators has 'owner', which is whoever started the server")
        if self.renew and not self.annotators:
            raise ValueError("renew is for the people in annotators; name some or leave it out")


@dataclass(kw_only=True)
class ExportConfig(Options):
    """Write the comparisons of a file as rows to learn from."""

    annotations: Path
    """file of comparisons"""
    out: Path
    """file to write"""
    format: Literal["puna", "trl", "label-studio"] = "puna"
    """rows for puna reward, for TRL (which puna reward reads, too), or Label Studio's tasks"""
    batch: CountOrZero = 0
    """batch to write; 0: all"""


@dataclass(kw_only=True)
class ImportConfig(ReadingComparisons):
    """Bring comparisons from elsewhere into a file; what is in it already is passed over."""

    annotations: Path
    """file of comparisons, made where there is none"""
    data: list[Path]
    """files to read"""
    format: Literal["puna", "trl", "label-studio"] = "puna"
    """as of export"""

    def check(self) -> None:
        given = (self.columns, self.roles, self.ratings) != (Columns(), {}, {})
        if self.format == "label-studio" and given:
            raise ValueError("Label Studio's tasks have no columns of their own; leave those out")
