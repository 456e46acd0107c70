"""`compress bench`: what is timed is right, a wrong product gets no time, and the table, the picture and the JSON agree."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lmpress.cli import app
from lmpress.compress.errors import UsageError
from lmpress.eval.timing import bench, candidates, plot
from lmpress.kernels.cpu import library
from lmpress.kernels.kernel import Unavailable

try:
    library.library()
except Unavailable as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "RING_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "RING_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "SQUARE", 64)


def test_every_candidate_multiplies_by_its_weight() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    names = []
    for each in candidates.candidates(64, 256):
        expected = x.double() @ each.dense().double().T
        for work in each.ring[:2]:
            assert (work(x).double() - expected).norm() <= each.tolerance * expected.norm(), each.name
        assert each.bytes * len(each.ring) > 1 << 20
        names.append(each.name)
    assert names[0] == candidates.BASELINE and len(set(names)) == len(names)
    assert {"torch bfloat16", "torch float16"} < set(names)


def test_figures_follow_from_the_times() -> None:
    found = bench.bench(["64x256", "128x128"], [1, 4], rounds=3, only="w4a32|w8a8")
    kinds = {(t.rows, t.columns, t.inputs) for t in found.timings}
    assert kinds == {(64, 256, 1), (64, 256, 4), (128, 128, 1), (128, 128, 4)}
    for kind in kinds:
        timings = {t.name: t for t in found.timings if (t.rows, t.columns, t.inputs) == kind}
        base = timings[candidates.BASELINE]
        assert base.ratio == 1
        for each in timings.values():
            assert each.fastest_ms <= each.median_ms <= each.slowest_ms
            assert each.ratio == pytest.approx(base.median_ms / each.median_ms)
            assert each.roofline > 0 and each.error < 2e-2
    assert any("w4a32" in t.name for t in found.timings) and not any("nf4" in t.name for t in found.timings)


def test_a_wrong_product_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = candidates.candidates

    def with_a_wrong_one(rows: int, columns: int, only: str):
        for each in real(rows, columns, only):
            yield each
        yield candidates.Candidate("halved", [lambda x: each.ring[0](x) / 2], each.bytes, each.dense, 1e-2)

    monkeypatch.setattr(bench, "candidates", with_a_wrong_one)
    found = bench.bench(["64x128"], [1], rounds=1, only="w4a32")
    wrong = found.timings[-1]
    assert wrong.name == "halved" and wrong.error == pytest.approx(0.5, abs=1e-3)
    assert (wrong.median_ms, wrong.ratio, wrong.roofline) == (None, None, None)
    plot.save(found, tmp_path / "bars.svg")
    assert "halved" not in (tmp_path / "bars.svg").read_text()


@pytest.mark.parametrize("shape", ["", "4096", "0x128", "64x100", "64x128x2"])
def test_shapes_that_are_none_are_refused(shape: str) -> None:
    with pytest.raises(UsageError, match="is no shape"):
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
