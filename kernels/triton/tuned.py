"""The tiles that a search found fastest on this kind of GPU, stored in the user's cache for other processes.

There is one JSON file per GPU, version of Triton and source of the kernels, because a result does not transfer to another.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cpu.folders import cache_folder, private_folder, replace_file, temporary_file
from ..kernel import Activations, Unavailable
from .configs import Config
from .layout import Tiles

BUCKETS = (
    1,
    16,
    32,
    64,
    128,
    512,
)  # upper bounds of the numbers of input rows that share a tile; the last has no bound
INTERPRETER = "interpreter"
POWERS = ("block_n", "block_m", "warps")  # fields of a tile that are powers of two
SOURCES = ("configs.py", "launch.py", "layout.py", "device/*.py")


@dataclass(frozen=True)
class Regime:
    """What the fastest tile of a product depends on, besides the GPU; `inputs` is one of BUCKETS."""

    inputs: int
    rows: int
    columns: int
    group: int
    bits: int
    zeros: bool
    codebook: bool
    activations: Activations
    dtype: str

    @classmethod
    def of(cls, m: int, tiles: Tiles, activations: Activations, dtype: torch.dtype) -> "Regime":
        """The regime of `m` input rows of `dtype` and a weight in `tiles`."""
        inputs = next((bucket for bucket in BUCKETS if m <= bucket), BUCKETS[-1])
        parts = (tiles.zeros is not None, tiles.codebook is not None)
        shape = (tiles.rows, tiles.columns, tiles.group, tiles.bits)
        if activations == "group" and tiles.scales.shape[0] == 1:
            activations = "token"  # the same product if there is one group
        return cls(inputs, *shape, *parts, activations, str(dtype).removeprefix("torch."))

    def __str__(self) -> str:
        """The key in the file."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


class Tuned:
    """The tiles of one file, which is read on first use; a file that is missing, damaged or of another format holds none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Config] | None = None
        self._trial: tuple[Regime, Config] | None = None

    def get(self, regime: Regime) -> Config | None:
        """The tile that is stored for `regime`, or None."""
        if self._trial is not None and self._trial[0] == regime:
            return self._trial[1]
        if self._found is None:
            self._found = _read(self.path)
        return self._found.get(str(regime)) if self._found else None

    @contextmanager
    def trying(self, regime: Regime, config: Config) -> Iterator[None]:
        """Inside the `with`, `config` is the tile of `regime`; it is not stored."""
        self._trial = (regime, config)
        try:
            yield
        finally:
            self._trial = None

    def keep(self, regime: Regime, config: Config) -> None:
        """Store the tile, together with those that other processes have stored meanwhile; the file is replaced as a whole.

        Raises `Unavailable` if no private folder can be created.
        """
        self.path = private_folder() / self.path.name
        self._found = _read(self.path) | {str(regime): config}
        content = json.dumps({name: asdict(each) for name, each in sorted(self._found.items())}, indent=1)
        with temporary_file(self.path) as file:
            file.write_text(content + "\n", encoding="utf-8")
            replace_file(file, self.path)


def tuned_on(tensor: Tensor) -> Tuned:
    """The tiles of the GPU that `tensor` is on."""
    return _of_device(tensor.get_device() if tensor.is_cuda else None)


@cache
def tuned_for(gpu: str) -> Tuned:
    """The tiles of the GPU called `gpu`, for this version of Triton and of the kernels."""
    parts = (gpu, version("triton"), _sources())
    name = re.sub(r"\W+", "-", gpu).strip("-").lower()
    return Tuned(_folder() / f"triton-{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.json")


def _folder() -> Path:
    """Where tiles are read from: the folder that they are written to, if there is one."""
    try:
        return private_folder()
    except Unavailable:
        return cache_folder()


@cache
def _of_device(index: int | None) -> Tuned:
    return tuned_for(INTERPRETER if index is None else torch.cuda.get_device_name(index))


def _sources() -> str:
    """A hash of the source files that determine what a tile means."""
    files = sorted(path for pattern in SOURCES for path in Path(__file__).parent.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _read(path: Path) -> dict[str, Config]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: _config(each) for name, each in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _config(given: Mapping[str, Any]) -> Config:
    """Raises `ValueError` if a number is not possible in a tile, `TypeError` if a name is not one of its fields."""
    config = Config(**given)
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) is not int or not 0 < value <= 256 or (field.name in POWERS and value & (value - 1)):
            raise ValueError(f"{field.name}={value!r}")
    return config
