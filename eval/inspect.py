"""The content of a model directory, read from the config and the file headers without loading a weight."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..calibrate.model.architecture import find_blocks, find_linears, weight_of
from ..calibrate.model.skeleton import Names, build, context_length
from ..calibrate.model.source import Source
from ..compress.formats.checkpoint import read_layers
from ..compress.formats.source import open_source
from ..compress.formats.tokenizer import has_tokenizer
from ..compress.output.record import check
from ..errors import UsageError
from ..recipes.scheme import kinds


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
    """The structure of a model. `linears` are those of the blocks; `context` is None if the config sets no limit.

    `checked`: every weight file has the SHA-256 that lmpress.json lists; False if there is no lmpress.json.
    """

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
    checked: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect(model: str | Path) -> Inspection:
    """The structure of the model in a directory or with a hub id. Raises what `open_source` and `build` raise, and
    `CompressError` if a weight file is damaged."""
    source = open_source(model)
    skeleton = build(source)
    prefix, blocks = find_blocks(skeleton)
    names, listed = Names(skeleton, source), _listed(source)
    found: Counter[tuple[str, str, tuple[int, int], str]] = Counter()
    for index, block in enumerate(blocks):
        for name, module in find_linears(block).items():
            rows, columns = weight_of(module).shape
            layer = f"{prefix}.{index}.{name}"
            stored = listed(layer, columns) or _dense(source, names, layer)
            found[name, type(module).__name__, (rows, columns), stored] += 1
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
        linears=tuple(LinearKind(n, m, shape, count, stored) for (n, m, shape, stored), count in found.items()),
        vocabulary=text.vocab_size,
        context=context_length(skeleton.config),
        tied_embeddings=bool(skeleton.config.tie_word_embeddings),
        tokenizer=has_tokenizer(source.path),
        checked=check(source.path),
        quantization=None
        if quantization is None
        else str(quantization.get("format", quantization.get("quant_method"))),
    )


def _listed(source: Source) -> Callable[[str, int], str | None]:
    """A function that describes how the layer of a name and width is compressed.

    It returns None if the layer is not compressed, or in a way that lmpress does not read.
    """
    try:
        reader, layers = read_layers(source) if "quantization_config" in source.config else (None, {})
    except UsageError:
        reader, layers = None, {}

    def words(layer: str, width: int) -> str | None:
        if reader is None or layer not in layers:
            return None
        args = layers[layer]
        return (reader.listed or kinds.kind_of(args).listed)(args, width)

    return words


def _dense(source: Source, names: Names, layer: str) -> str:
    """The dtype of a layer that is stored as plain numbers."""
    found = names.find(f"{layer}.weight")
    return "missing" if found is None else source.tensors[found].spec.dtype
