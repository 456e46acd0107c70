"""Tiles that were found on a GPU are stored for other processes, one file per GPU; damaged files are ignored."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lmpress
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.triton import configs, tuned
from lmpress.kernels.triton.configs import GEMV, Config
from lmpress.kernels.triton.product import TritonProduct
from lmpress.kernels.triton.tuned import Regime, Tuned, tuned_for
from lmpress.kernels.weight import Weight

pytest.importorskip("triton")

from lmpress.kernels.triton import launch
from lmpress.kernels.triton.tune import tune

REGIME = Regime(16, 4096, 4096, 128, 4, False, False, "float", "float16")
FOUND = Config(32, 16, 4, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (tuned.tuned_for, tuned._of_device):
        function.cache_clear()
    yield
    for function in (tuned.tuned_for, tuned._of_device):
        function.cache_clear()


def product(activations="float", columns: int = 128) -> TritonProduct:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (70, columns), generator=generator, dtype=torch.uint8)
    weight = Weight(codes, torch.rand(70, columns // 64, generator=generator), None, 4, 64)
    return TritonProduct(weight, KernelSpec.of(weight, activations))


def test_another_process_finds_stored_tiles() -> None:
    tuned_for("NVIDIA H200").keep(REGIME, FOUND)
    script = (
        "from lmpress.kernels.triton.tuned import Regime, tuned_for\n"
        f"print(tuned_for('NVIDIA H200').get({REGIME!r}))\n"
        f"print(tuned_for('NVIDIA A100').get({REGIME!r}))\n"
    )
    around = os.environ | {"PYTHONPATH": str(Path(lmpress.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=around, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [repr(FOUND), "None"]


def test_gpus_versions_and_sources_have_separate_files(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {tuned_for("NVIDIA H200").path, tuned_for("NVIDIA A100").path}
    for name, value in (("version", lambda package: "0.0"), ("_sources", lambda: "other")):
        with monkeypatch.context() as changed:
            changed.setattr(tuned, name, value)
            tuned.tuned_for.cache_clear()
            paths.add(tuned_for("NVIDIA H200").path)
    assert len(paths) == 4
    assert all(path.name.startswith("triton-nvidia-") and path.suffix == ".json" for path in paths)


def test_the_tiles_of_two_processes_are_stored_together() -> None:
    one, two = (Tuned(tuned_for("a GPU").path) for _ in range(2))
    others = replace(REGIME, inputs=32)
    assert one.get(others) is None  # it has read the file, which was not there
    two.keep(others, GEMV)
    one.keep(REGIME, FOUND)
    fresh = Tuned(one.path)
    assert (fresh.get(REGIME), fresh.get(others)) == (FOUND, GEMV)
    assert one.path.stat().st_mode & 0o077 == 0
    assert [path.name for path in one.path.parent.iterdir()] == [one.path.name]  # no temporary file is left


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", "null", '{"x": 1}', '{"x": {}}', '{"x": {"block_n": "64"}}']
    + [
        json.dumps({str(REGIME): {"block_n": 32, "block_m": 16, "warps": 4, "stages": 3, "programs": 4} | wrong})
        for wrong in ({"block_n": 48}, {"block_m": 0}, {"warps": 1 << 20}, {"stages": 1.5}, {"block_n": True}, {"x": 1})
    ],
)
def test_damaged_files_are_ignored_and_written_again(content: str) -> None:
    kept = tuned_for("a GPU")
    kept.keep(REGIME, FOUND)
    kept.path.write_text(content)
    damaged = Tuned(kept.path)
    assert damaged.get(REGIME) is None
    damaged.keep(REGIME, FOUND)
    assert Tuned(kept.path).get(REGIME) == FOUND


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    tiles = tuned_for("a GPU")
    (tmp_path / "lmpress" / "kernels").chmod(0o777)
    tiles.keep(REGIME, FOUND)
    assert tiles.path.is_relative_to(tmp_path / "temporary")
    tuned.tuned_for.cache_clear()
    assert tuned_for("a GPU").get(REGIME) == FOUND


@pytest.mark.parametrize(("activations", "m"), [("float", 1), ("float", 3), ("group", 3), ("token", 70)])
def test_the_fastest_tile_is_found_stored_and_used(activations, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock prefers one of the tiles; the interpreter runs all of them."""
    multiplies = product(activations)
    x = torch.randn(m, 128, generator=torch.Generator().manual_seed(1))
    expected, taken = multiplies(x), []
    chosen = launch._chosen
    monkeypatch.setattr(launch, "_chosen", lambda *args: taken.append(chosen(*args)) or taken[-1])
    favourite = launch.choices(x, multiplies.layout, activations)[-1]

    def seconds(calls, x) -> float:
        calls[0](x)
        return 1.0 if taken[-1] == favourite else 2.0

    found = tune([multiplies], [m], torch.float32, seconds)
    assert list(found.values()) == [favourite]
    assert set(taken) == set(configs.variants(taken[0])) and 1 < len(set(taken)) <= 8
    assert tune([multiplies], [m], torch.float32, seconds) == {}  # it is stored already
    tuned.tuned_for.cache_clear()  # as in another process
    tuned._of_device.cache_clear()
    torch.testing.assert_close(multiplies(x), expected, rtol=1e-5, atol=1e-5)
    assert taken[-1] == favourite


def test_a_tile_that_is_wrong_is_never_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplies, wrong = product(), replace(GEMV, block_n=16, programs=4)
    row = launch._multiply_row

    def broken(x, tiles):
        return row(x, tiles) * (0 if launch._chosen(x, tiles, "float", x.dtype) == wrong else 1)

    monkeypatch.setattr(launch, "_multiply_row", broken)
    assert wrong in configs.variants(GEMV)
    (found,) = tune([multiplies], [1], torch.float32, lambda calls, x: 1.0 if calls[0](x).any() else 0.0).values()
    assert found == GEMV


def test_products_that_take_no_tile_are_left_out() -> None:
    assert tune([product()], [configs.MOST_ROWS + 1], torch.float32, lambda calls, x: 1.0) == {}
