"""The output while it grows: a hidden sibling of the target directory, one file per finished block, renamed when complete.

A run that ends early leaves its finished blocks, whatever ended it; the same command finds them and resumes. Only an
impossible request (or a damaged model), or a failure before the first block is finished, removes the workspace.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from torch import Tensor

from ..calibrate.data.token_rows import TokenRows
from ..calibrate.model import safetensors_io
from ..calibrate.model.source import Source
from ..errors import CompressError, StorageError, UsageError
from ..kernels.cache.ranges import KVRanges
from ..kernels.tensor import Compressed
from ..recipes.schema import Recipe, dump
from ..recipes.scheme import CACHE_KEY, QuantArgs, WeightArgs
from .block import Linear
from .formats import pack_quantized
from .formats.kv_cache import CACHE_RANGES, kv_cache_scheme, read_ranges, scales, write_ranges
from .formats.registry import Format, format_of
from .output import target
from .output.parts import read_figures, write_figures
from .output.target import MANIFEST
from .plan import Plan
from .report import card

PARTS, SCRATCH, OUTSIDE, REPORT = "parts", "scratch", "outside", "report.json"
Figures = dict[str, float | int | str]


@dataclass
class Workspace:
    """Use as a context manager; `finish` makes `out` appear."""

    out: Path
    source: Source
    plan: Plan
    recipe: Recipe
    rows: TokenRows | None
    complete: bool = False  # an earlier run has published the result and was stopped before it removed the workspace
    _figures: dict[int, list[Figures]] = field(default_factory=dict)  # of the finished blocks

    @classmethod
    def open(
        cls, out: Path, source: Source, plan: Plan, recipe: Recipe, rows: TokenRows | None, overwrite: bool
    ) -> Self:
        """Prepare the workspace of `out`, taking up an unfinished run of the same request.

        Raises `UsageError` if an unfinished run of another request lies there or if `out` is another result, `StorageError` if
        the directory cannot be written or is too small.
        """
        workspace = cls(out, source, plan, recipe, rows)
        try:
            workspace._prepare(overwrite)
        except StorageError as error:
            workspace._leave(error)
            raise
        return workspace

    @property
    def path(self) -> Path:
        """The hidden sibling of the output."""
        return target.sibling(self.out, "partial")

    @property
    def scratch(self) -> Path:
        """A place for files that only the run itself needs."""
        return self.path / SCRATCH

    def has(self, index: int) -> bool:
        """Whether block `index` is finished."""
        return index in self._figures

    @property
    def unfinished(self) -> int:
        """The first block that is not finished."""
        return next((i for i in range(self.plan.blocks) if not self.has(i)), self.plan.blocks)

    def write(self, index: int, linears: list[Linear], rewritten: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Store block `index`: its packed linears, and its other tensors as `rewritten` has them, or else the source."""
        tensors: dict[str, Tensor] = {}
        for linear in linears:
            assert linear.result is not None
            tensors |= self._format(linear.args).pack(linear.name, linear.result)
        prefix = f"{self.plan.prefix}.{index}."
        taken = {o: stored for o, stored in self.plan.copied.items() if o.startswith(prefix)}
        tensors |= {o: rewritten[o] if o in rewritten else self.source.read(stored) for o, stored in taken.items()}
        figures = [_figures(linear) for linear in linears]
        safetensors_io.write(self._part(f"block-{index:05d}"), dict(sorted(tensors.items())))
        with safetensors_io.storage_errors(self.path):
            parts = [path for path in self._parts_of(index) if path.exists()]
            write_figures(self._figures_file(index), figures, parts)
        self._figures[index] = figures

    def write_outside(self, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors outside the blocks that a transform rewrote."""
        safetensors_io.write(self._part(OUTSIDE), tensors)

    def outside(self) -> dict[str, Tensor]:
        """The tensors outside the blocks that were rewritten; none if there are none."""
        part = self._part(OUTSIDE)
        return safetensors_io.read(part) if part.exists() else {}

    def write_cache_ranges(self, index: int, ends: KVRanges) -> None:
        """Store the calibrated ranges of the cache of block `index`: before the block, so that every block has them."""
        if self.plan.attentions and self.plan.kv is not None:
            tensors = scales(self.plan.attentions[index], ends, self.plan.kv)
            safetensors_io.write(self._part(f"cache-{index:05d}"), tensors)
        else:
            write_ranges(self._cache_ranges(index), [ends])

    def compressed(self, index: int) -> dict[str, Compressed]:
        """The compressed weights of the finished block `index` by layer name."""
        tensors = safetensors_io.read(self._part(f"block-{index:05d}"))
        names = [layer.name for layer in self.plan.layers if layer.block == index and layer.args]
        args = self.plan.quantized
        return {name: self._format(args[name]).unpack(name, tensors, args[name]) for name in names}

    def dense(self, index: int) -> dict[str, Tensor]:
        """The other tensors of the finished block `index`."""
        tensors = safetensors_io.read(self._part(f"block-{index:05d}"))
        return {name: tensor for name, tensor in tensors.items() if name in self.plan.copied}

    def layers(self) -> list[Figures]:
        """The figures of every compressed layer of the finished blocks."""
        return [each for index in range(self.plan.blocks) for each in self._figures[index]]

    def report(self) -> dict[str, Any]:
        """The content of report.json of a `complete` result, after its workspace is removed."""
        content = json.loads((self.out / REPORT).read_text())
        target.remove_working(self.path)
        return content

    def finish(self, judged: Mapping[str, Any] = MappingProxyType({})) -> list[Figures]:
        """Complete the checkpoint and put it in place, `judged` in its report. Returns the figures of every quantized layer."""
        self._write_others()
        figures = self.layers()
        complete = self.path / "complete"
        with safetensors_io.storage_errors(self.path):
            shutil.rmtree(complete, ignore_errors=True)
            complete.mkdir()
            safetensors_io.assemble(sorted((self.path / PARTS).glob("*.safetensors")), complete, self.plan.renamed)
            if self.plan.kv is not None and self.plan.kv.static and not self.plan.attentions:
                ranges = [read_ranges(self._cache_ranges(index))[0] for index in range(self.plan.blocks)]
                write_ranges(complete / CACHE_RANGES, ranges)
            self._write_documents(complete, figures, judged)
            target.publish(complete, self.out, self._request)
            target.remove_working(self.path)
        return figures

    def _write_others(self) -> None:
        """Store the tensors outside the blocks that no transform rewrote."""
        inside = tuple(f"{self.plan.prefix}.{i}." for i in range(self.plan.blocks))
        outside = self._part(OUTSIDE)
        rewritten = safetensors_io.read_header(outside) if outside.exists() else {}
        for count, (name, stored) in enumerate(sorted(self.plan.copied.items())):
            if not name.startswith(inside) and name not in rewritten:
                safetensors_io.write(self._part(f"other-{count:05d}"), {name: self.source.read(stored, check=True)})

    def _write_documents(self, complete: Path, figures: list[Figures], judged: Mapping[str, Any]) -> None:
        used = self._format(next(iter(self.plan.quantized.values())))
        called = self.plan.called
        dense = [called.get(name, name) for name in (*self.plan.dense, *self.plan.heads, *self.plan.routers)]
        quantized = {called.get(name, name): args for name, args in self.plan.quantized.items()}
        quantization = used.quantization_config(quantized, dense)
        if quantization and self.plan.tables:
            quantization["config_groups"] |= self._tables_group()
        config = self.source.config | ({"quantization_config": quantization} if quantization else {})
        if self.plan.untied is not None:
            config["tie_word_embeddings"] = False
        if self.plan.kv is not None:
            config[CACHE_KEY] = asdict(self.plan.kv)
            if self.plan.attentions:
                config["quantization_config"]["kv_cache_scheme"] = kv_cache_scheme(self.plan.kv)
        (complete / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.source.copy_companions(complete)
        (complete / "recipe.yaml").write_text(dump(self.recipe))
        report = {**self._provenance(), **judged, "layers": figures}
        (complete / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        (complete / "README.md").write_text(card.render(self.source, self.plan, self.recipe, self.rows))

    def _tables_group(self) -> dict[str, Any]:
        """Embedding and head in the groups of config.json: by name, since the other groups target all linears."""
        args = self.plan.tables[0].args
        assert isinstance(args, QuantArgs)
        return {"group_outside": pack_quantized.group(args, [table.name for table in self.plan.tables])}

    def _format(self, args: WeightArgs) -> Format:
        return format_of(args, self.plan.inputs)

    def _part(self, name: str) -> Path:
        return self.path / PARTS / f"{name}.safetensors"

    def _cache_ranges(self, index: int) -> Path:
        return self.path / PARTS / f"ranges-{index:05d}"

    def _figures_file(self, index: int) -> Path:
        return self.path / PARTS / f"block-{index:05d}.json"

    def _parts_of(self, index: int) -> tuple[Path, ...]:
        """The files that block `index` may have."""
        return self._part(f"block-{index:05d}"), self._part(f"cache-{index:05d}"), self._cache_ranges(index)

    @property
    def _manifest(self) -> str:
        return json.dumps(self._provenance(), indent=2, sort_keys=True)

    @property
    def _request(self) -> str:
        return hashlib.sha256(self._manifest.encode()).hexdigest()

    def _provenance(self) -> dict[str, object]:
        """What the result depends on: equal provenance means equal bytes."""
        return {
            "base_model": self.source.name,
            "source": self.source.fingerprint,
            "companions": self.source.companions,
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration": None if self.rows is None else self.rows.fingerprint,
            "versions": {name: version(name) for name in ("lmpress", "torch", "transformers")},
        }

    def _prepare(self, overwrite: bool) -> None:
        manifest, found = self._manifest, self.path / MANIFEST
        if self.out.exists() and not overwrite:
            self.complete = target.is_published(self.out, self._request)
            if not self.complete:
                raise target.exists_already(self.out)
            return
        with safetensors_io.storage_errors(self.path):
            target.make_private(self.path)
            known = found.read_text() if found.exists() else ""
        if known not in ("", manifest) and not overwrite:
            raise UsageError(
                f"{self.path} holds an unfinished run with other settings", "repeat those, or discard it: --overwrite"
            )
        with safetensors_io.storage_errors(self.path):
            if known != manifest:  # parts without their manifest are of an unknown run
                target.remove_working(self.path)
                target.make_private(self.path)
            for name in (SCRATCH, "complete"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            self._find_finished()
            self._check_space()
            (self.path / PARTS).mkdir(exist_ok=True)
            self.scratch.mkdir()
            safetensors_io.write_text(found, manifest)

    def _find_finished(self) -> None:
        """Find the finished blocks; one with a damaged file is not."""
        for index in range(self.plan.blocks):
            figures = read_figures(self._figures_file(index))
            if figures is not None:
                self._figures[index] = figures

    def _check_space(self) -> None:
        """Raise `StorageError` if the disk has less space than the rest of the run needs."""
        free = shutil.disk_usage(self.path).free
        done = [path for index in self._figures for path in self._parts_of(index) if path.exists()]
        # the blocks, and the shards that are assembled from them
        needed = max(0, 2 * self.plan.bytes_after - sum(path.stat().st_size for path in done))
        if free < needed:
            raise StorageError(
                f"{self.out.parent} has {free:,} bytes free, the run takes up to {needed:,}",
                "free some space or choose another -o",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Keep finished blocks for the same command to resume from, else remove the workspace."""
        impossible = isinstance(error, CompressError) and not isinstance(error, StorageError)
        if error is not None and (impossible or not self._figures) and not self.complete:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _figures(linear: Linear) -> Figures:
    return {"name": linear.name, **linear.args.figures, **linear.figures}
