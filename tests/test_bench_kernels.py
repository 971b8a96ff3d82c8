"""`puna bench kernels` on tiny shapes: what it prints, and that it refuses what is wrong."""

import json
from dataclasses import replace

import pytest
import torch

from puna import kernels
from puna.benchmarks import machine, output, timing
from puna.benchmarks.gpu import bars
from puna.benchmarks.kernels import cases as kernel_cases
from puna.benchmarks.kernels import run as bench
from puna.benchmarks.kernels.verify import verify
from puna.cli.main import main
from puna.core.native.loader import extension

CPU = torch.device("cpu")
TINY = kernel_cases.Sizes(
    dtype=torch.float32, rows=16, widths=(24,), sequences=2, tokens=8, heads=((2, 1),),
    head_dim=8, decoded=3, dim=12, vocabularies=(40,), drawn=4, rollouts=(3, 5),
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command measures tiny shapes, quickly, and saves to a folder of the test."""
    monkeypatch.setattr(bench, "CPU", TINY)
    monkeypatch.setattr(output, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    monkeypatch.setattr(bench, "why_not_compiled", lambda device: "not in this test")
    monkeypatch.setattr(bench, "kernel_clock", lambda device: lambda call: (call(), 1.0)[1])
    return tmp_path


def command(*flags):
    return main(["bench", "kernels", "--rounds", "2", *flags])


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_operation_is_measured(tiny, capsys):
    assert command("--save") == 0
    document = last_line(capsys)
    public = {name for name in vars(kernels) if callable(getattr(kernels, name))}
    assert {row["operation"] for row in document["rows"]} == public - {"rope_tables", "use_backend"}
    for row in document["rows"]:
        assert row["bench"] == "kernel" and row["failed"] is None and row["peak_mb"] is None
        assert 0 < row["p20"] <= row["value"] <= row["p80"] and row["limit"] > 0 and row["ms"] > 0
        assert 0 <= row["error"] < 1e-5
        assert row["unit"] in ("GB/s", "TFLOP/s")
    for operation, provider in (("attention", "sdpa"), ("rope", "torch"), ("swiglu", "puna")):
        directions = {
            row["direction"]
            for row in document["rows"]
            if (row["operation"], row["provider"]) == (operation, provider)
        }
        assert directions == {"forward", "forward+backward"}
    (written,) = tiny.rglob("kernels.json")
    assert json.loads(written.read_text()) == document


def wrong_forward(gate, up):
    return kernels.swiglu(gate, up) * (1 + 1e-5)


def wrong_backward(gate, up):
    y = kernels.swiglu(gate, up)
    return y + 1e-5 * (gate - gate.detach())  # the value is right, its derivative is not


def broken(gate, up):
    raise ZeroDivisionError("of course")


def not_a_number(gate, up):
    return kernels.swiglu(gate, up).where(gate != gate.max(), torch.nan)


@pytest.mark.parametrize(
    ("kernel", "refused", "said"),
    [
        (wrong_forward, 2, "off fp64"),
        (wrong_backward, 1, "off fp64"),
        (broken, 2, "ZeroDivisionError: of course"),
        (not_a_number, 2, "not finite"),
    ],
)
def test_a_wrong_kernel_is_refused(tiny, capsys, monkeypatch, kernel, refused, said):
    make = kernel_cases.swiglu
    monkeypatch.setattr(
        kernel_cases,
        "swiglu",
        lambda *args: replace(make(*args), ours=lambda gate, up: (kernel(gate, up),)),
    )
    assert command("--operations", "swiglu", "rms_norm") == 1
    captured = capsys.readouterr()
    assert captured.err == "puna bench kernels: wrong, and not timed: swiglu\n"
    rows = json.loads(captured.out.splitlines()[-1])["rows"]
    failed = [row for row in rows if row["failed"]]
    assert len(failed) == refused
    for row in failed:
        assert (row["operation"], row["provider"]) == ("swiglu", "puna")
        assert said in row["failed"] and row["value"] is row["ms"] is row["p20"] is None
    native = {"puna-native"} if extension() else set()
    assert {row["provider"] for row in rows if not row["failed"]} == {"puna", "torch"} | native


def test_a_wrong_peer_is_not_timed_and_costs_no_exit_status(tiny, capsys, monkeypatch):
    monkeypatch.setattr(kernel_cases.peers, "sdpa", lambda q, k, v: (2 * q,))
    assert command("--operations", "attention") == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out.splitlines()[-1])["rows"]
    failed = [row for row in rows if row["failed"]]
    assert {row["provider"] for row in failed} == {"sdpa"} and len(failed) == 2
    assert "not timed: sdpa, attention 2x8 2/1x8 forward: result 0 is " in captured.out


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_wrong_draw_is_refused(top_p):
    case = kernel_cases.sample(TINY, CPU, top_p)

    def shifted(logits, seeds, draws):
        tokens, _ = case.ours(logits, seeds, draws)
        tokens = (tokens + (torch.arange(len(tokens)) == 1)) % logits.shape[1]
        return tokens, torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]

    verdicts = verify(case, {"puna": case.ours, "x": shifted}, case.make(), False)
    assert verdicts["puna"].failed is None
    assert verdicts["x"].failed and "result 0" in verdicts["x"].failed


def test_inputs_written_over_by_one_provider_are_not_anothers():
    case = kernel_cases.swiglu(TINY, CPU, 24)

    def selfish(gate, up):
        found = case.ours(gate, up)
        with torch.no_grad():
            gate.zero_()
        return found

    providers = {"x": selfish, "puna": case.ours}
    assert verify(case, providers, case.make(), False)["puna"].failed is None


def test_what_is_far_slower_has_few_rounds(monkeypatch):
    """The others keep theirs, in turn, and as they are asked for where all are slow."""
    seconds, calls = {"ours": 0.04, "peer": 0.3, "plain": 0.7}, []
    measuring = bench.Bench(30, CPU, compiles=False)
    measuring.clock = lambda call: seconds[call()]
    work = {name: lambda name=name: calls.append(name) or name for name in seconds}
    found = measuring.timings(work)
    assert list(found) == list(work) and found["plain"].median == 0.7
    assert [calls.count(name) for name in work] == [32, 32, 5]  # one call each comes before
    assert calls[3:7] == ["peer", "ours", "ours", "peer"]
    calls.clear()
    seconds["ours"] = 0.1
    measuring.timings(work)
    assert [calls.count(name) for name in work] == [32, 32, 32]
    assert measuring.timings({}) == {}


def test_the_shapes_of_the_bars_come_first():
    """Time may end: what is cut off is the rest."""
    found = [(case.operation, case.shape) for case in kernel_cases.cases(kernel_cases.GPU, CPU)]
    norms = {(name, f"8192x{width}") for name in bars.MEMORY for width in bars.WIDTHS}
    attention = {("attention", shape) for shape in bars.ATTENTION}
    losses = {(name, f"8192x4096x{words}") for name in bars.LOSSES for words in bars.VOCABULARIES}
    for wanted in (norms, attention, losses):
        operations = {operation for operation, _ in wanted}
        mine = [each for each in found if each[0] in operations]
        assert set(mine[: len(wanted)]) == wanted and len(mine) > len(wanted)


def test_an_unknown_operation_is_named(tiny, capsys):
    assert command("--operations", "rms_nrom") == 1
    assert "no operation is called 'rms_nrom'; there is rms_norm," in capsys.readouterr().err


def test_without_a_compiler_its_rows_are_left_out(tiny, capsys):
    assert command("--operations", "gae") == 0
    assert "torch.compile does not work here, its rows are left out" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(monkeypatch, capsys):
    """That it runs, by Puna's own rows. Of a kilobyte nothing is measured: a copy of it is no
    ceiling. Other people's kernels need not take such shapes, nor compiled ones a minute."""
    monkeypatch.setattr(bench, "GPU", replace(TINY, dtype=torch.bfloat16))
    monkeypatch.setattr(bench, "ABOVE", float("inf"))
    monkeypatch.setattr(kernel_cases, "peers_of", lambda operation, device: {})
    assert main(["bench", "kernels", "--rounds", "2", "--device", "cuda", "--no-compiled"]) == 0
    rows = [row for row in last_line(capsys)["rows"] if row["provider"] == "puna"]
    cases = kernel_cases.cases(TINY, CPU)
    assert {row["operation"] for row in rows} == {case.operation for case in cases}
    assert {row["dtype"] for row in rows} == {"bf16", "fp32"}
    for row in rows:
        assert row["failed"] is None and row["peak_mb"] is not None and row["host_us"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_call_gives_what_the_call_gives():
    x = torch.ones(8, device="cuda")
    replay = timing.captured(lambda: x.mul_(2))
    assert replay is not None
    replay()
    assert x.eq(8).all()  # twice before the capture, which itself computes nothing, and once now
    assert timing.captured(lambda: x.sum().item()) is None
    assert timing.host_seconds(lambda: x.mul_(1)) > 0
