"""One generation's place in the native engine: a key/value cache and what else a call writes to."""

from typing import Any

import torch
from torch import Tensor

from puna.core.config import ModelConfig
from puna.core.documents import count_of
from puna.core.ops import NoDistribution, check_settings


class Session:
    """A key/value cache, rows of `max_tokens` tokens, over an engine's weights.

    For one call at a time: RuntimeError for a second thread. `native` is the extension's session,
    `alive` what that goes on reading.
    """

    def __init__(self, native: Any, config: ModelConfig, outputs: int, alive: tuple[Tensor, ...]):
        self.config, self.outputs = config, outputs  # of the head: V, or 1 for a score
        self._native, self._alive = native, alive

    def reserve(self, rows: int, max_tokens: int) -> None:
        """Room for `rows` rows of `max_tokens` tokens; what was in the cache is lost."""
        if rows < 1 or not 1 <= max_tokens <= self.config.context:
            raise ValueError(
                f"cannot reserve {count_of(rows, 'row')} of {count_of(max_tokens, 'token')}: at "
                f"least 1 row, and 1 to {self.config.context} tokens (the model's context)"
            )
        self._native.reserve(rows, max_tokens)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""
        rows, max_tokens = self._native.rows, self._native.max_tokens
        if not (0 <= source < rows and 0 <= target < rows and 0 <= length <= max_tokens):
            raise ValueError(
                f"cannot copy {count_of(length, 'token')} from row {source} to row {target} of a "
                f"cache of {count_of(rows, 'row')} of {count_of(max_tokens, 'token')}"
            )
        if source != target:
            self._native.copy_row(source, target, length)

    def logits(self, tokens: Tensor, rows: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """Append tokens (N,) at `positions` (N,) of cache `rows` (N,); all int64.

        A row's tokens stand next to each other, positions rising by one; a token sees its row up
        to itself. Returns logits (W, V), or scores (W, 1), fp32 after the tokens numbered `wanted`
        (W,).
        Raises ValueError for tensors that are not CPU int64, contiguous and of fitting lengths,
        for ids the model does not know and for places outside the cache.
        """
        logits = self._room(wanted)
        self._forward(tokens, rows, positions, wanted, logits, 1, -1, 0.0, (0, 0, 0))
        return logits

    def draw(
        self,
        tokens: Tensor,
        rows: Tensor,
        positions: Tensor,
        wanted: Tensor,
        *,
        seeds: Tensor,
        temperature: float,
        eos_id: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `logits`, and draw a token after each of `wanted`, for S steps on end.

        Seeds (S, W) int64; the draw is `ops.sample`'s without truncation. A token that was drawn
        is fed to its row, until S steps are done or one of them drew `eos_id` in some row.
        Returns tokens (S', W) int64 and log-probs (S', W) fp32 of the S' steps done. Raises
        ValueError too where the cache has no room for S steps, and NoDistribution where the logits
        leave nothing to draw from.
        """
        steps, count = seeds.shape
        _check_ids("seeds", seeds, (steps, wanted.numel()))
        check_settings(temperature, 0, 1.0)
        drawn, logprobs = torch.empty(steps, count, dtype=torch.int64), torch.empty(steps, count)
        done = self._forward(
            tokens, rows, positions, wanted, self._room(wanted),
            steps, -1 if eos_id is None else eos_id, float(temperature),
            (seeds.data_ptr(), drawn.data_ptr(), logprobs.data_ptr()),
        )  # fmt: skip
        if done < 0:
            raise NoDistribution(int(logprobs[-done - 1].isnan().int().argmax()))
        return drawn[:done], logprobs[:done]

    def _room(self, wanted: Tensor) -> Tensor:
        return torch.empty(wanted.numel(), self.outputs)

    def _forward(
        self,
        tokens: Tensor,
        rows: Tensor,
        positions: Tensor,
        wanted: Tensor,
        logits: Tensor,
        steps: int,
        eos_id: int,
        temperature: float,
        drawn: tuple[int, int, int],  # addresses of seeds, tokens, log-probs; or zeros
    ) -> int:
        count = tokens.numel()
        for name, tensor in (("tokens", tokens), ("rows", rows), ("positions", positions)):
            _check_ids(name, tensor, (count,))
        _check_ids("wanted", wanted, (wanted.numel(),))
        return self._native.forward(
            count, tokens.data_ptr(), rows.data_ptr(), positions.data_ptr(),
            wanted.numel(), wanted.data_ptr(), logits.data_ptr(),
            steps, eos_id, temperature, *drawn, torch.get_num_threads(),
        )  # fmt: skip


def _check_ids(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if (
        tensor.dtype != torch.int64
        or tensor.device.type != "cpu"
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or tensor.data_ptr() % 8
    ):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected a "
            f"contiguous int64 {shape} on the CPU"
        )
