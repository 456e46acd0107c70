"""`compress bench`: what is timed is right, a wrong product gets no time, and the table, the picture and the JSON agree."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lmpress.cli import app
from lmpress.errors import UsageError
from lmpress.eval.timing import bench, machine, plot, products
from lmpress.eval.timing.machine import TimingDevice, time_calls, time_graph
from lmpress.kernels.cpu import library
from lmpress.kernels.kernel import Unavailable

try:
    library.library()
except Unavailable as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RING_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "SQUARE", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_multiplies_by_its_weight(dtype: torch.dtype) -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    names = []
    for each in products.products(64, 256, "^(torch [bf]|c-)", dtype=dtype):
        expected, ring = x.double() @ each.dense().double().T, each.ring(1 << 20)
        for work in ring[:2]:
            y = work(x)
            assert y.dtype == dtype and (y.double() - expected).norm() <= each.tolerance * expected.norm(), each.name
        assert each.bytes * len(ring) > 1 << 20
        names.append(each.name)
    assert names[0] == f"torch {dtype}".replace("torch.", "") and len(set(names)) == len(names)
    assert {"torch bfloat16", "torch float16"} < set(names)


def test_products_that_only_cpus_have_are_timed_there() -> None:
    names = [each.name for each in products.products(64, 256, "torch")]
    assert {"torch dynamic int8", "torch int8, bfloat16"} < set(names)


def test_figures_follow_from_the_times() -> None:
    found = bench.bench(["64x256", "128x128"], [1, 4], rounds=3, only="w4a32|w8a8")
    kinds = {(t.rows, t.columns, t.inputs) for t in found.timings}
    assert kinds == {(64, 256, 1), (64, 256, 4), (128, 128, 1), (128, 128, 4)}
    for kind in kinds:
        timings = {t.name: t for t in found.timings if (t.rows, t.columns, t.inputs) == kind}
        base = timings["torch float32"]
        assert base.ratio == 1
        for each in timings.values():
            assert each.fastest_ms <= each.median_ms <= each.slowest_ms
            assert each.ratio == pytest.approx(base.median_ms / each.median_ms)
            assert each.roofline > 0 and each.error < 2e-2
    assert any("w4a32" in t.name for t in found.timings) and not any("nf4" in t.name for t in found.timings)


def test_a_wrong_product_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = products.products

    def with_a_wrong_one(*wanted):
        for each in real(*wanted):
            yield each
        right = each.make()
        yield products.Product("halved", lambda: lambda x: right(x) / 2, each.bytes, each.dense, 1e-2)

    monkeypatch.setattr(bench, "products", with_a_wrong_one)
    found = bench.bench(["64x128"], [1], rounds=1, only="w4a32")
    wrong = found.timings[-1]
    assert wrong.name == "halved" and wrong.error == pytest.approx(0.5, abs=1e-3)
    assert (wrong.median_ms, wrong.ratio, wrong.roofline) == (None, None, None)
    plot.save(found, tmp_path / "bars.svg")
    assert "halved" not in (tmp_path / "bars.svg").read_text()


@pytest.mark.parametrize("shape", ["", "4096", "0x128", "64x100", "64x128x2"])
def test_shapes_that_are_none_are_refused(shape: str) -> None:
    with pytest.raises(UsageError, match="--shapes expects OUTxIN"):
        bench.bench([shape])


def test_the_command(tmp_path: Path) -> None:
    picture, data = tmp_path / "bars.png", tmp_path / "bench.json"
    words = ["bench", "--shapes", "64x128", "--rows", "1,2", "--rounds", "2", "--only", "w4a32"]
    done = CliRunner().invoke(app, [*words, "--plot", str(picture), "--json", str(data)])
    assert done.exit_code == 0, done.output
    assert "64 x 128, 2 row(s) of inputs" in done.output and "of roofline" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    read = json.loads(data.read_text())
    assert {t["inputs"] for t in read["timings"]} == {1, 2} and read["machine"]["threads"] == 1
    for wrong in (["--rows", "1,x"], ["--rows", "0"], ["--only", "("], ["--plot", str(tmp_path / "bars.txt")]):
        assert CliRunner().invoke(app, [*words, *wrong]).exit_code == 2, wrong


def test_a_ring_is_larger_than_a_gpus_cache_and_timed_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls in their order, on a machine that only notes them."""
    log: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            log.append(f"{self.name} begins")

        def __exit__(self, *_: object) -> None:
            log.append(f"{self.name} ends")

        def __getattr__(self, called: str):
            return lambda *_: log.append(f"{self.name} {called}")

        def elapsed_time(self, end: "Noted") -> float:
            return 6.0  # milliseconds

    stand_ins = {
        "Stream": lambda: Noted("side"),
        "current_stream": lambda: Noted("main"),
        "stream": lambda stream: stream,
        "CUDAGraph": lambda: Noted("graph"),
        "graph": lambda graph: Noted("capture"),
        "Event": lambda timed: Noted("event"),
        "get_device_properties": lambda device: type("Facts", (), {"L2_cache_size": 50 << 20}),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls = [lambda x, name=name: log.append(name) for name in ("one", "two", "three")]
    seconds = time_graph(calls, torch.zeros(1))
    assert log.index("side begins") < log.index("one") < log.index("side ends") < log.index("capture begins")
    assert log[log.index("capture begins") :] == ["capture begins", "one", "two", "three", "capture ends"]
    assert seconds() == pytest.approx(6e-3 / 3)
    assert log[-4:] == ["event record", "graph replay", "event record", "event synchronize"]
    monkeypatch.setattr(machine, "device_of", torch.device)
    found = machine.timing_device("cuda")
    assert (found.ring_bytes, found.baseline, found.timer) == (200 << 20, "torch bfloat16", time_graph)


def test_a_search_sees_the_copies_of_each_triton_product(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from lmpress.kernels.kernel import KernelSpec
    from lmpress.kernels.triton import tuned
    from lmpress.kernels.triton.product import TritonProduct
    from lmpress.kernels.weight import Weight

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (tuned.tuned_for, tuned._of_device):
        monkeypatch.setattr(tuned, function.__name__, function.__wrapped__)
    weight = Weight(torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 1), None, 4, 64)
    ring = [torch.nn.Sequential(TritonProduct(weight, KernelSpec.of(weight))) for _ in range(2)]
    seen: list[int] = []

    def timer(calls, x):
        seen.append(len(calls))
        return time_calls(calls, x)

    here = TimingDevice(torch.device("cpu"), torch.float32, 1 << 20, timer)
    bench.search([lambda x: x, *ring], [1], here)
    assert set(seen) == {2}
    (kept,) = (tmp_path / "lmpress" / "kernels").glob("triton-interpreter-*.json")
    assert list(json.loads(kept.read_text())) == [
        "inputs=1 rows=64 columns=64 group=64 bits=4 zeros=False codebook=False activations=float dtype=float32"
    ]


@pytest.mark.parametrize(("words", "reason"), [
    (["--device", "nonsense"], "'nonsense' is unknown"),
    (["--device", "cuda:77"], "no device 'cuda:77'"),
    (["--tune"], "give --device cuda"),
])  # fmt: skip
def test_what_is_not_there_is_one_line(words: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, ["bench", "--shapes", "64x128", *words])
    assert done.exit_code == 2 and reason in done.output and "Traceback" not in done.output
