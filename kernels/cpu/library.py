"""The compiled kernels as Python calls: structures, signatures, instruction sets."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CompressError
from ..kernel import Unavailable, WrongMachine
from .build import load
from .layout import Panels

SOURCE = Path(__file__).with_name("lmpress_cpu.c")

# How activations enter a product; the numbers are those of native/types.h.
ACTIVATIONS = {"float": 0, "group": 1, "token": 2}
# The dtypes of the values of a pruned weight; the numbers are those of native/types.h.
VALUES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BAD_INDEX = -2  # status of native/sparse.h
OUTSIDE = "a sparse matrix is damaged"

Pruned = tuple[Tensor, Tensor, Tensor]  # mask, values and starts (see `PrunedWeight`)


class _Weight(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("bilevel_codes", ctypes.c_void_p),
        ("bilevel_grids", ctypes.c_void_p),
        ("outlier_columns", ctypes.c_void_p),
        ("outliers", ctypes.c_void_p),
        ("outlier_count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("center", ctypes.c_int32),
        ("half_scales", ctypes.c_int32),
    )


class _Pruned(ctypes.Structure):
    _fields_ = (
        ("mask", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("kind", ctypes.c_int32),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        ("weights", ctypes.c_void_p * 7),
        ("biases", ctypes.c_void_p * 7),
        ("norms", ctypes.c_void_p * 4),
        ("epsilons", ctypes.c_float * 4),
        ("scaling", ctypes.c_float),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
    )


class _Mode(ctypes.Structure):
    _fields_ = (("activations", ctypes.c_int32), ("threads", ctypes.c_int32), ("steps", ctypes.c_float))


@dataclass(frozen=True)
class InstructionSet:
    """One of the library's instruction sets that this machine can run."""

    name: str
    index: int
    lanes: int


def library() -> ctypes.CDLL:
    """The compiled library. Raises `Unavailable` if it cannot be built or loaded; that is tried once per process."""
    found = _load()
    if isinstance(found, Unavailable):
        raise found
    return found


@cache
def _load() -> ctypes.CDLL | Unavailable:
    try:
        calls = load(SOURCE)
    except Unavailable as error:
        return error
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    calls.lmpress_instruction_set.argtypes, calls.lmpress_instruction_set.restype = (
        (int32, ctypes.POINTER(int32)),
        ctypes.c_char_p,
    )
    calls.lmpress_linear.argtypes = (int32, pointer, pointer, pointer, int64, pointer)
    calls.lmpress_dequantize.argtypes = (int32, pointer, int32, int64, int64, pointer, int64)
    calls.lmpress_dequantize.restype = None
    calls.lmpress_decode_project.argtypes = (int32, *(pointer,) * 8)
    calls.lmpress_decode_attend.argtypes = (int32, *(pointer,) * 5, int64, pointer, int64, int64, pointer)
    calls.lmpress_pruned_linear.argtypes = (int32, pointer, int32, pointer, int64, pointer)
    calls.lmpress_pruned_to_dense.argtypes = (int32, pointer, int32, int64, int64, pointer)
    calls.lmpress_pruned_to_dense.restype = None
    sparse = (pointer, pointer, int32, pointer, int64, int64, int64)
    calls.lmpress_add_sparse.argtypes = (int32, *sparse, pointer, int64, pointer)
    return calls


@cache
def instruction_sets() -> dict[str, InstructionSet]:
    """The instruction sets that this machine can run, by name, best first. Raises `Unavailable` as `library` does."""
    found, index, lanes = {}, 0, ctypes.c_int32()
    while name := library().lmpress_instruction_set(index, ctypes.byref(lanes)):
        if lanes.value:
            found[name.decode()] = InstructionSet(name.decode(), index, lanes.value)
        index += 1
    return found


def instruction_set(name: str) -> InstructionSet:
    """The instruction set called `name`. Raises `WrongMachine` if this machine does not have it."""
    if name not in instruction_sets():
        raise WrongMachine(f"this machine does not have the instruction set {name}")
    return instruction_sets()[name]


class Linear:
    """The product with a weight in panels, prepared once: the addresses of its tensors, and how activations enter.

    Raises `WrongMachine` if this machine does not have the instruction set `instructions`, `CompressError` if columns kept
    in 16 bits lie outside the weight.
    """

    def __init__(self, panels: Panels, instructions: str, activations: str, steps: float) -> None:
        _check_columns(panels.outlier_columns, panels.columns)
        self.panels, self.activations, self.instructions = panels, activations, instruction_set(instructions)
        self.weight, self.mode = _structure(panels), _Mode(ACTIVATIONS[activations], 1, steps)
        self._run = library().lmpress_linear

    def __call__(self, x: Tensor) -> Tensor:
        """`x W^T` for contiguous float32 `x` `[m, columns]`: float32 `[m, rows]`. Raises `MemoryError` if out of memory."""
        y = torch.empty(x.shape[0], self.panels.rows, dtype=torch.float32)
        self.mode.threads = torch.get_num_threads()
        weight, mode = ctypes.byref(self.weight), ctypes.byref(self.mode)
        _check(self._run(self.instructions.index, weight, mode, x.data_ptr(), x.shape[0], y.data_ptr()), x)
        return y


class Block:
    """A decoder block prepared for single tokens (its formula is in native/types.h): the addresses of its tensors.

    linears  products by q, k, v, o, gate, up and down, with the same `activations`
    biases   of these, float32 `[rows]`, or None
    norms    weight float32 and epsilon: before attention, before the MLP, of query heads and of key heads, or None
    scaling  factor of the attention scores
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        biases: Sequence[Tensor | None],
        norms: Sequence[tuple[Tensor, float] | None],
        head_size: int,
        scaling: float,
    ) -> None:
        self._owners = (*linears, *biases, *norms)  # of the memory that the structure points to
        self._mode, self._index = linears[0].mode, linears[0].instructions.index
        self._heads, self._kv_heads = (each.panels.rows // head_size for each in linears[:2])
        self.head_size = head_size
        block = _Block(scaling=scaling, heads=self._heads, kv_heads=self._kv_heads, head_size=head_size)
        block.weights[:] = [ctypes.addressof(each.weight) for each in linears]
        block.biases[:] = [None if each is None else each.data_ptr() for each in biases]
        block.norms[:] = [None if each is None else each[0].data_ptr() for each in norms]
        block.epsilons[:] = [0 if each is None else each[1] for each in norms]
        self._block = block

    def project(self, x: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values float32 `[1, heads, 1, head_size]` of the token `x`, contiguous float32 `[1, 1, hidden]`.

        cosines, sines  of its position, contiguous float32 `[..., head_size]`

        Raises `MemoryError` if out of memory.
        """
        shapes = ((1, heads, 1, self.head_size) for heads in (self._heads, self._kv_heads, self._kv_heads))
        found = queries, keys, values = tuple(torch.empty(shape) for shape in shapes)
        self._mode.threads = torch.get_num_threads()
        given = (x.data_ptr(), cosines.data_ptr(), sines.data_ptr(), *(each.data_ptr() for each in found))
        block, mode = ctypes.byref(self._block), ctypes.byref(self._mode)
        _check(library().lmpress_decode_project(self._index, block, mode, *given), x)
        return queries, keys, values

    def attend(self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The block's output for the token `x`, in the shape of `x`.

        Its `queries` attend to `keys` and `values`, float `[1, kv_heads, length, head_size]`. Raises `MemoryError` if out of
        memory.
        """
        y = torch.empty_like(x)
        keys, values = _rows_together(keys), _rows_together(values)
        past = (keys.data_ptr(), keys.stride(1), values.data_ptr(), values.stride(1), keys.shape[2])
        block, mode = ctypes.byref(self._block), ctypes.byref(self._mode)
        given = (x.data_ptr(), queries.data_ptr(), *past, y.data_ptr())
        _check(library().lmpress_decode_attend(self._index, block, mode, *given), x)
        return y


def dequantize(panels: Panels, instructions: InstructionSet, first: int, count: int, out: Tensor) -> None:
    """Write the transposed rows of the panels `first .. first + count - 1` to `out` float32 `[columns, >= count * lanes]`."""
    weight = _structure(panels)
    threads = torch.get_num_threads()
    library().lmpress_dequantize(
        instructions.index, ctypes.byref(weight), threads, first, count, out.data_ptr(), out.stride(0)
    )


def pruned_linear(x: Tensor, pruned: Pruned, instructions: InstructionSet) -> Tensor:
    """`x W^T` for contiguous float32 `x` `[m, columns]`: float32 `[m, rows]`. Raises `MemoryError` if out of memory."""
    y = torch.empty(x.shape[0], pruned[0].shape[0], dtype=torch.float32)
    weight, threads = _pruned_structure(pruned, x.shape[1]), torch.get_num_threads()
    given = (x.data_ptr(), x.shape[0], y.data_ptr())
    _check(library().lmpress_pruned_linear(instructions.index, ctypes.byref(weight), threads, *given), x)
    return y


def to_dense(pruned: Pruned, instructions: InstructionSet, first: int, out: Tensor) -> None:
    """Write the rows from `first` on to contiguous float32 `out` `[rows, columns]`."""
    weight, threads = _pruned_structure(pruned, out.shape[1]), torch.get_num_threads()
    library().lmpress_pruned_to_dense(
        instructions.index, ctypes.byref(weight), threads, first, out.shape[0], out.data_ptr()
    )


def add_sparse(y: Tensor, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> None:
    """`y += x S^T` in place for contiguous float32 `y` `[m, rows]` and `x` `[m, columns]`.

    S is in compressed rows: `starts` int64 `[rows + 1]`, `columns` int32 or uint16, `values` float16. Raises `MemoryError` if
    out of memory, `CompressError` if S does not fit `y` and `x`.
    """
    if (len(starts), len(values), len(x)) != (y.shape[1] + 1, len(columns), len(y)):
        raise CompressError(f"{OUTSIDE}: {len(starts)} starts, {len(columns)} columns, {len(values)} values")
    entries = (columns.data_ptr(), columns.itemsize == 4, values.data_ptr(), len(columns))
    sparse = (starts.data_ptr(), *entries, y.shape[1], x.shape[1])
    status = library().lmpress_add_sparse(torch.get_num_threads(), *sparse, x.data_ptr(), x.shape[0], y.data_ptr())
    _check(status, x)


def _rows_together(heads: Tensor) -> Tensor:
    """`heads` `[1, n, length, size]` in float32, with the rows of every head contiguous."""
    heads = heads.float()
    return heads if heads.stride()[2:] == (heads.shape[3], 1) else heads.contiguous()


def _check(status: int, x: Tensor) -> None:
    if status == BAD_INDEX:
        raise CompressError(f"{OUTSIDE}: entries are not all in the {x.shape[1]} columns of the weight")
    if status:
        raise MemoryError(f"not enough memory to pack activations of shape {tuple(x.shape)}")


def _check_columns(columns: Tensor | None, width: int) -> None:
    """The kernels write at these columns."""
    if columns is not None and len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < width:
        raise CompressError(f"the columns kept in 16 bits are not all in the {width} columns of the weight")


def _structure(panels: Panels) -> _Weight:
    grid = (panels.packed, panels.scales, panels.offsets, panels.codebook, panels.bilevel_codes, panels.bilevel_grids)
    pointers = [None if each is None else each.data_ptr() for each in (*grid, panels.outlier_columns, panels.outliers)]
    outlier_count = 0 if panels.outlier_columns is None else len(panels.outlier_columns)
    half_scales = panels.scales is not None and panels.scales.dtype == torch.float16
    shape = (panels.rows, panels.columns, panels.group)
    return _Weight(*pointers, outlier_count, *shape, panels.bits, panels.center, half_scales)


def _pruned_structure(pruned: Pruned, columns: int) -> _Pruned:
    mask, values, starts = pruned
    return _Pruned(mask.data_ptr(), values.data_ptr(), starts.data_ptr(), mask.shape[0], columns, VALUES[values.dtype])
