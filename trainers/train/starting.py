"""What a run goes on from: its newest checkpoint, else the model that was named."""

from pathlib import Path
from typing import Any

from puna.core.checkpoint.folder import open_model, open_source
from puna.core.checkpoint.source import Source
from puna.trainers.train.run import Run

STARTS = ("model", "policy", "student")  # options that name what a run began with


def open_start(run: Run, start: Path, **options: Any) -> Source:
    """The weights to go on from: the newest checkpoint's, else those of `start`."""
    if run.checkpoint is not None:
        if run.amended.intersection(STARTS):
            # It is recorded, and nothing else would look at it; scores start from either head.
            if options["head"] == "score":
                open_source(start)
            else:
                open_model(start, **options)
        options.pop("fresh_head", None)
        run.say_idle(STARTS, f"the weights are those of {run.checkpoint.name}")
    return open_model(run.weights(start), **options)
