"""The newest reward models on what people say now, before they are trained on it: whether they
still know what people want of the newest answers (paper section 3.2.2)."""

from collections.abc import Mapping
from pathlib import Path

import torch

from puna.annotate.background import Background
from puna.annotate.supply import files_of, version_of
from puna.core.checkpoint.folder import load_model, open_source, tokenizer_path
from puna.core.device import device_of_name
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.annotations.scores import ToScore, put_scores, to_score
from puna.trainers.annotations.store import Store
from puna.trainers.data.packing import encode_held_out
from puna.trainers.reward import scores_of

AT_ONCE = 16  # comparisons between two looks at whether a person waits


class Judge:
    """A reward model and the comparisons of its kind."""

    def __init__(self, kind: str, path: Path, device: torch.device):
        check_judge(kind, path)
        self.kind, self.path, self.version = kind, path, version_of(path)
        self.tokenizer = Tokenizer(tokenizer_path(path))
        self.model = load_model(path, device=device).eval()
        self.written = max(each.stat().st_mtime for each in files_of(path))

    def differences(self, waiting: list[ToScore]) -> list[tuple[int, float | None]]:
        """(verdict, r_chosen - r_rejected) of each; None for a dialogue longer than the context."""
        found: list[tuple[int, float | None]] = []
        for each in waiting:
            pairs, _ = encode_held_out(self.tokenizer, [each.row], self.model.config.context)
            scores = scores_of(self.model, pairs, 1, self.model.device, str(self.path))
            found.append((each.verdict, float(scores[0, 0] - scores[0, 1]) if pairs else None))
        return found


def check_judge(kind: str, path: Path) -> None:
    """ValueError where a model is none that scores."""
    if open_source(path).head != "score":
        raise ValueError(f"{path} is a language model; {kind}_reward takes a reward model")


class Scoring:
    """Scores comparisons as they come, in a thread beside the page."""

    def __init__(self, store: Store, rewards: Mapping[str, Path], device: str):
        self.store = store
        self.judges = [Judge(kind, path, device_of_name(device)) for kind, path in rewards.items()]
        self.background = Background(self.step, "comparisons can no longer be scored")

    def step(self) -> bool:
        """Score a few comparisons; returns whether there were any."""
        for judge in self.judges:
            waiting = to_score(self.store, judge.kind, judge.version, judge.written, AT_ONCE)
            if waiting:
                scores = judge.differences(waiting)
                put_scores(self.store, str(judge.path), judge.version, scores)
                return True
        return False
