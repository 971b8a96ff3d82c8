"""Whether a provider does the work: before it is timed, and by what the timed calls give.

A provider's largest error may be twice that of plain PyTorch in the same dtype and one unit in the
last place of the largest value more, gradients included. After the timing the very calls that were
timed get other inputs, in the same memory, and must give what is right for these: an answer that
was kept, or was still on its way when the call returned, is found.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from puna.benchmarks.kernels.cases import Case
from puna.benchmarks.kernels.peers import Function, by_rows


class Verdict(NamedTuple):
    error: float | None  # relative to the largest magnitude; None where there is no number
    failed: str | None


def run_once(function: Function, case: Case, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """Outputs, and the gradients with `backward`, of a function that may write over its inputs."""
    inputs = [t.clone() for t in inputs]
    if not backward:
        with torch.no_grad():
            return list(function(*inputs))
    leaves = [inputs[i].requires_grad_() for i in case.differentiable]
    outputs = function(*inputs)
    kept = [out.detach().clone() for out in outputs]
    return [*kept, *torch.autograd.grad(outputs, leaves, upstreams(outputs))]


class Prepared(NamedTuple):
    """The call that is timed, over inputs of its own."""

    call: Callable[[], object]
    inputs: list[Tensor]


def prepared(function: Function, case: Case, inputs: list[Tensor], backward: bool) -> Prepared:
    """What is timed: the function, or its gradients."""
    inputs = [t.clone() for t in inputs]
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(*inputs)

        return Prepared(forward, inputs)
    leaves = [inputs[i].requires_grad_() for i in case.differentiable]
    given = upstreams(function(*inputs))
    return Prepared(lambda: torch.autograd.grad(function(*inputs), leaves, given), inputs)


def upstreams(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Normal gradients, the same for every provider; 1 for a loss."""
    generator = torch.Generator(outputs[0].device).manual_seed(2)

    def drawn(out: Tensor) -> Tensor:
        if not out.dim():
            return torch.ones_like(out)
        return torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)

    return [drawn(out) for out in outputs]


class Truth(NamedTuple):
    """What is right for some inputs, and how far off plain PyTorch is in their dtype."""

    pairs: Callable[[list[Tensor]], list[tuple[Tensor, Tensor]]]  # of results: (found, right)
    allowed: list[float]
    dtypes: list[torch.dtype]


def truth_of(case: Case, inputs: list[Tensor], backward: bool, gradients_alone: bool) -> Truth:
    """By PyTorch in fp64; of outputs and gradients, or of the gradients alone."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    first = -len(case.differentiable) if gradients_alone else None
    exact = run_once(case.exact or case.eager, case, wide, backward)[first:]
    plain = run_once(case.eager, case, inputs, backward)[first:]

    def pairs(found: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        if case.compare:
            return case.compare(found, exact, wide)
        return list(zip(found, exact, strict=True))

    allowed = [largest_error(*pair) for pair in pairs(plain)]
    if case.by_row and not gradients_alone:
        # In a mean, errors may cancel by luck: take them as they are before.
        (rows,), (truth,) = case.by_row(*inputs), by_rows(case.by_row)(*wide)
        allowed[0] = float((rows.double() - truth).abs().mean())
    return Truth(pairs, allowed, [result.dtype for result in plain])


def verify(
    case: Case, providers: Mapping[str, Function], inputs: list[Tensor], backward: bool
) -> dict[str, Verdict]:
    """Every provider's errors beside plain PyTorch's, against PyTorch in fp64."""
    truth = truth_of(case, inputs, backward, gradients_alone=False)
    return {
        name: verdict_of(truth, partial(run_once, function, case, inputs, backward))
        for name, function in providers.items()
    }


def verify_timed(
    case: Case, calls: Mapping[str, Prepared], inputs: list[Tensor], backward: bool
) -> dict[str, Verdict]:
    """The same of the calls that have been timed, whose inputs now hold other values."""
    others = [t.roll(1, 0) if t.dim() else t for t in inputs]
    truth = truth_of(case, others, backward, gradients_alone=backward)

    def again(timed: Prepared) -> list[Tensor]:
        with torch.no_grad():
            for held, other in zip(timed.inputs, others, strict=True):
                held.copy_(other)
        found = timed.call()
        assert isinstance(found, tuple | list)
        return [result.clone() for result in found]  # at once, as whoever uses it would

    return {name: verdict_of(truth, partial(again, timed)) for name, timed in calls.items()}


def verdict_of(truth: Truth, results: Callable[[], list[Tensor]]) -> Verdict:
    try:
        found = results()
        for number, (result, dtype) in enumerate(zip(found, truth.dtypes, strict=True)):
            if narrower(result.dtype, dtype):
                return Verdict(None, f"result {number} is {result.dtype}, not {dtype}")
        return judge(truth.pairs(found), truth.allowed)
    except Exception as error:  # the provider's own failure: its row says so
        said = str(error).strip().splitlines() or [""]
        return Verdict(None, f"{type(error).__name__}: {said[0]}")


def narrower(found: torch.dtype, plain: torch.dtype) -> bool:
    """Whether a result has fewer digits than plain PyTorch's."""
    if not (found.is_floating_point and plain.is_floating_point):
        return found.is_floating_point != plain.is_floating_point
    return torch.finfo(found).eps > torch.finfo(plain).eps


def largest_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max())


def judge(pairs: list[tuple[Tensor, Tensor]], peers: list[float]) -> Verdict:
    """Against twice the peer's error of each result, and one unit in the last place."""
    worst = 0.0
    for number, ((found, truth), peer) in enumerate(zip(pairs, peers, strict=True)):
        if found.shape != truth.shape:
            return Verdict(
                None, f"result {number} is {tuple(found.shape)}, not {tuple(truth.shape)}"
            )
        if not found.isfinite().all():
            return Verdict(None, f"result {number} is not finite")
        scale, error = float(truth.abs().max()), largest_error(found, truth)
        allowed = 2 * peer + torch.finfo(found.dtype).eps * scale
        worst = max(worst, error / scale if scale else error)
        if not error <= allowed:
            said = f"result {number} is {error:.2g} off fp64, {allowed:.2g} allowed"
            return Verdict(worst, said)
    return Verdict(worst, None)
