"""The products that `compress bench` times: our kernels, torch's own products, and those of other installed libraries."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import dispatch
from ...kernels.kernel import Activations, Kernel, KernelSpec
from ...kernels.outliers import prepare
from ...kernels.tensor import Bilevel, PrunedTensor, SpQRTensor
from ...kernels.tensor.grid import encode
from ...kernels.weight import PrunedWeight, SparseRows, Weight
from ...recipes.scheme import QuantArgs
from ...recipes.scheme.prune_args import PruneArgs
from .machine import Call

CPU = torch.device("cpu")
GROUP = 128
NEGATIVE = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
POSITIVE = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
NF4 = torch.tensor([*NEGATIVE, *POSITIVE])
UNTIMED = ("c-portable", "torch-dequantize")  # the fallback kernels


@dataclass(frozen=True)
class Product:
    """A product under test.

    make       returns a function that multiplies by a new copy of the weight
    bytes      that one call reads
    dense      returns the weight `(out, in)` in float32, for the reference
    tolerance  of the relative error to the reference
    """

    name: str
    make: Callable[[], Call]
    bytes: int
    dense: Callable[[], Tensor]
    tolerance: float

    def ring(self, total: int) -> list[Call]:
        """Copies that together fill more than `total` bytes, at least two."""
        return [self.make() for _ in range(max(2, total // self.bytes + 1))]


def products(
    rows: int, columns: int, only: str = "", device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Iterator[Product]:
    """torch's product in `dtype` first, then its 16-bit ones, other libraries' and ours, for inputs of `dtype` on `device`.

    The baseline is always there; of the others those whose names match the regular expression `only`. `columns` is a multiple
    of 128.
    """
    dense = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(device)
    baseline = _dense_product(dense.to(dtype))
    yield baseline
    int4, int8 = _rounded_weight(dense, 4, GROUP), _rounded_weight(dense, 8, columns)
    for name, make in _library_products(dense, int4, int8).items():
        if re.search(only, name) and name != baseline.name:
            yield make(name)
    weights = _kernel_weights(dense, int4, int8)
    for kernel in dispatch.KERNELS:
        for name, (make_weight, activations) in weights.items():
            full = f"{kernel.name} {name}"
            if kernel.name in UNTIMED or not re.search(only, full):
                continue
            spec = KernelSpec.of(make_weight(), activations, dtype)
            if dispatch.refusal(kernel, spec) is None:
                yield _kernel_product(full, kernel, make_weight(), spec)


def _kernel_weights(
    dense: Tensor, int4: Weight, int8: Weight
) -> dict[str, tuple[Callable[[], Weight | PrunedWeight], Activations]]:
    """The weights that our kernels multiply by, each created when it is first needed, with the kind of inputs."""
    int3, int2 = cache(lambda: _rounded_weight(dense, 3, GROUP)), cache(lambda: _rounded_weight(dense, 2, GROUP))
    spqr, with_outliers = cache(lambda: _bilevel_weight(dense, 0.0)), cache(lambda: _bilevel_weight(dense, 0.01))
    half, two_of_four = PruneArgs(dtype="bfloat16"), PruneArgs(pattern="2:4", dtype="bfloat16")
    return {
        "w4a8": (lambda: int4, "group"), "w4a32": (lambda: int4, "float"),
        "w8a8": (lambda: int8, "token"), "w8a32": (lambda: int8, "float"),
        "w3a8": (int3, "group"), "w3a32": (int3, "float"), "w2a8": (int2, "group"), "w2a32": (int2, "float"),
        "nf4": (cache(lambda: _nf4_weight(dense)), "float"),
        "w4a8 + 1% sparse": (cache(lambda: _sparse_weight(int4)), "group"),
        "llm.int8, 0.5% columns": (cache(lambda: _outlier_columns_weight(int8, dense)), "token"),
        "spqr, no outliers": (spqr, "float"), "spqr, 1% outliers": (with_outliers, "float"),
        "spqr a8, no outliers": (spqr, "group"), "spqr a8, 1% outliers": (with_outliers, "group"),
        "pruned 50%": (cache(lambda: _pruned_weight(dense, half)), "float"),
        "pruned 2:4": (cache(lambda: _pruned_weight(dense, two_of_four)), "float"),
    }  # fmt: skip


def _library_products(dense: Tensor, int4: Weight, int8: Weight) -> dict[str, Callable[[str], Product]]:
    """torch's own products and those of installed libraries: name -> function of the name."""
    found: dict[str, Callable[[str], Product]] = {
        "torch bfloat16": lambda _: _dense_product(dense.bfloat16()),
        "torch float16": lambda _: _dense_product(dense.half()),
    }
    if dense.device.type != "cpu":
        return found
    found["torch dynamic int8"] = lambda name: _torch_dynamic_int8(name, int8)
    found["torch int8, bfloat16"] = lambda name: _torch_int8_bf16(name, int8)
    if find_spec("onnxruntime") and find_spec("onnx"):
        found["onnxruntime int4, int8 inputs"] = lambda name: _onnxruntime_int4(name, int4, level=4, tolerance=1e-2)
        found["onnxruntime int4, float32 inputs"] = lambda name: _onnxruntime_int4(name, int4, level=1, tolerance=1e-5)
    return found


def _dense_product(weight: Tensor) -> Product:
    """torch's product in the dtype of `weight`, for inputs of any dtype."""

    def make() -> Call:
        own = weight.clone()
        return lambda x: F.linear(x.to(own.dtype), own).to(x.dtype)

    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return Product(f"torch {str(weight.dtype).removeprefix('torch.')}", make, weight.nbytes, weight.float, tolerance)


def _kernel_product(name: str, kernel: Kernel, weight: Weight | PrunedWeight, spec: KernelSpec) -> Product:
    first = prepare(kernel, weight, spec)
    exact = kernel.tolerance <= 1e-5 and spec.activations == "float"
    tolerance = max(1e-5 if exact else 1e-2, torch.finfo(spec.dtype).eps)
    return Product(name, lambda: copy.deepcopy(first), _buffer_bytes(first), weight.dequantize, tolerance)


def _torch_dynamic_int8(name: str, weight: Weight) -> Product:
    """torch's dynamic int8 product, 7 bits (`reduce_range`): with 8 it saturates silently on machines without VNNI."""
    scales, zeros = weight.scale.flatten().double(), torch.zeros(len(weight.scale), dtype=torch.long)
    with warnings.catch_warnings(action="ignore"):  # only the tensors are deprecated, not the product
        codes = torch._make_per_channel_quantized_tensor((weight.codes.int() - 128).to(torch.int8), scales, zeros, 0)  # type: ignore[attr-defined]

    def make() -> Call:
        packed = torch.ops.quantized.linear_prepack(codes, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True)

    return Product(name, make, weight.codes.nbytes, weight.dequantize, 3e-2)


def _torch_int8_bf16(name: str, weight: Weight) -> Product:
    """torch's weight-only int8 product; only its bfloat16 form is fast."""
    stored, scales = (weight.codes.int() - 128).to(torch.int8), weight.scale.flatten().bfloat16()

    def make() -> Call:
        own = stored.clone()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), own, scales).float()

    return Product(name, make, stored.nbytes, weight.dequantize, 1e-2)


def _onnxruntime_int4(name: str, weight: Weight, level: int, tolerance: float) -> Product:
    """onnxruntime's MatMulNBits; accuracy level 4 rounds the activations to int8, level 1 keeps them in float32."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    nibbles = (weight.codes[:, ::2] | weight.codes[:, 1::2] << 4).view(rows, columns // GROUP, GROUP // 2)
    scales = weight.scale.float().flatten()
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=GROUP, accuracy_level=level,
    )  # fmt: skip
    inputs = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", columns])
    outputs = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])
    constants = [numpy_helper.from_array(nibbles.numpy(), "codes"), numpy_helper.from_array(scales.numpy(), "scales")]
    graph = helper.make_graph([node], "product", [inputs], [outputs], constants)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # it would occupy the cores of the next product

    def make() -> Call:
        session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    read = nibbles.nbytes + scales.nbytes
    return Product(name, make, read, weight.dequantize, tolerance)


def _rounded_weight(dense: Tensor, bits: int, group: int) -> Weight:
    """The weight rounded to nearest, symmetric, in groups of `group` columns."""
    groups = dense.unflatten(1, (-1, group))
    scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half()
    codes = (groups / scale.float().unsqueeze(-1)).round_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    return Weight(codes.flatten(1).to(torch.uint8), scale, None, bits, group)


def _nf4_weight(dense: Tensor) -> Weight:
    groups = dense.unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1)
    table = NF4.to(dense.device)
    edges = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(groups / scale.unsqueeze(-1), edges).flatten(1).to(torch.uint8)
    return Weight(codes, scale, None, 4, 64, codebook=table)


def _sparse_weight(weight: Weight) -> Weight:
    chosen = _random_mask(weight.codes, 0.01)
    return Weight(weight.codes, weight.scale, None, 4, GROUP, residual=SparseRows.of(chosen * 0.1))


def _bilevel_weight(dense: Tensor, outliers: float) -> Weight:
    """4 bits in groups of 32 with bilevel scales and zeros; a random share `outliers` of the weights has a residual."""
    args = QuantArgs(symmetric=False, group_size=32, formula="spqr", scale_dtype="bilevel", outliers=outliers)
    groups = dense.unflatten(1, (-1, 32))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = Bilevel.fit((high - low) / args.maxq)
    steps = scale.values(torch.float32).clamp(min=1e-9)
    zero = Bilevel.fit(-low / steps)
    codes = encode(groups, steps.unsqueeze(-1), zero.values(torch.float32).unsqueeze(-1), args)
    kept = _random_mask(dense, outliers)
    values = torch.full((int(kept.sum()),), 0.1, dtype=torch.float16, device=dense.device)
    residual = (kept.sum(1), kept.nonzero()[:, 1], values)
    return Weight.of(SpQRTensor(codes.flatten(1).to(torch.uint8), scale, zero, *residual, args))


def _outlier_columns_weight(weight: Weight, dense: Tensor) -> Weight:
    columns = torch.arange(0, weight.shape[1], 200, device=dense.device)
    return Weight(weight.codes, weight.scale, None, 8, weight.group, columns=columns, outliers=dense[:, columns].half())


def _random_mask(like: Tensor, share: float) -> Tensor:
    """A bool mask of the shape of `like`; a random `share` of it is true."""
    return (torch.rand(like.shape, generator=torch.Generator().manual_seed(1)) < share).to(like.device)


def _pruned_weight(dense: Tensor, args: PruneArgs) -> PrunedWeight:
    """The weight without its smaller half, of every 4 columns with a pattern, else of the whole matrix."""
    size = 4 if args.pattern else dense.numel()
    order = dense.abs().view(-1, size).argsort(-1).argsort(-1)
    return PrunedWeight.of(PrunedTensor.of(dense, (order < size // 2).view_as(dense), args))


def _buffer_bytes(module: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())
