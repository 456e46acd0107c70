"""The content of a model directory, read from the config and the file headers without loading a weight."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..calibrate.model.architecture import find_blocks, find_linears, weight_of
from ..calibrate.model.skeleton import Names, build, context_length
from ..calibrate.model.source import Source
from ..compress.formats.source import open_source
from ..compress.formats.tokenizer import has_tokenizer


@dataclass(frozen=True)
class LinearKind:
    """Linear layers of one name and shape; `stored` is their storage (`BF16`, `int4 symmetric, groups of 32`, ...)."""

    name: str
    module: str
    shape: tuple[int, int]
    count: int
    stored: str


@dataclass(frozen=True)
class Inspection:
    """The structure of a model. `linears` are those of the blocks; `context` is None where the config sets no limit."""

    path: str
    architecture: str
    parameters: int
    nbytes: int
    files: int
    dtypes: dict[str, int]
    blocks: str
    block_count: int
    linears: tuple[LinearKind, ...]
    vocabulary: int
    context: int | None
    tied_embeddings: bool
    tokenizer: bool
    quantization: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect(model: str | Path) -> Inspection:
    """The structure of the model in a directory or with a hub id. Raises what `open_source` and `build` raise."""
    source = open_source(model)
    skeleton = build(source)
    prefix, blocks = find_blocks(skeleton)
    names = Names(skeleton, source)
    kinds: Counter[tuple[str, str, tuple[int, int], str]] = Counter()
    for index, block in enumerate(blocks):
        for name, module in find_linears(block).items():
            rows, columns = weight_of(module).shape
            stored = _stored(source, names, f"{prefix}.{index}.{name}")
            kinds[name, type(module).__name__, (rows, columns), stored] += 1
    dtypes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        dtypes[tensor.spec.dtype] += tensor.spec.nbytes
    text = skeleton.config.get_text_config()
    quantization = source.config.get("quantization_config")
    return Inspection(
        path=str(source.path),
        architecture=type(skeleton).__name__,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        nbytes=source.nbytes,
        files=len({tensor.file for tensor in source.tensors.values()}),
        dtypes=dict(dtypes.most_common()),
        blocks=prefix,
        block_count=len(blocks),
        linears=tuple(LinearKind(n, m, shape, count, stored) for (n, m, shape, stored), count in kinds.items()),
        vocabulary=text.vocab_size,
        context=context_length(skeleton.config),
        tied_embeddings=bool(skeleton.config.tie_word_embeddings),
        tokenizer=has_tokenizer(source.path),
        quantization=None if quantization is None else str(quantization.get("format", quantization["quant_method"])),
    )


def _stored(source: Source, names: Names, layer: str) -> str:
    """How the weight of `layer` lies on disk."""
    dense = names.find(f"{layer}.weight")
    if dense is not None:
        return source.tensors[dense].spec.dtype
    places, bitmask = (source.tensors.get(f"{layer}.weight_{part}") for part in ("places", "bitmask"))
    if places is not None or bitmask is not None:
        return "2:4" if places is not None else "bitmask"
    if f"{layer}.weight_tiles" in source.tensors:
        return "SpQR tiles"
    if f"{layer}.weight_blocks" in source.tensors:
        config = source.config["quantization_config"]
        return next(g["block"] for g in config.get("base", config)["config_groups"] if layer in g["targets"])
    packed, shape = source.tensors.get(f"{layer}.weight_packed"), source.tensors.get(f"{layer}.weight_shape")
    if packed is None or shape is None:
        return "missing"
    rows, columns = (int(n) for n in shape.read())
    groups = source.tensors[f"{layer}.weight_scale"].spec.shape[1]
    bits = 32 * math.prod(packed.spec.shape) // (rows * columns)
    kind = "asymmetric" if f"{layer}.weight_zero_point" in source.tensors else "symmetric"
    return f"int{bits} {kind}, " + (f"groups of {columns // groups}" if groups > 1 else "one scale per row")
