"""The cells of `interop.py` as data: ways to quantize, and which of them are tried in each runtime and format."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmpress.recipes.scheme import QuantArgs, group_strategy, inputs_per, signed_weights

NF4 = QuantArgs(strategy="flat", group_size=64, formula="nf4", scale_dtype="nested")


@dataclass(frozen=True)
class Weights:
    """A way to quantize: `options` of `lmpress.quantize`, and the scheme that they give a wide layer. `written_as` is the
    format that quantizing writes, without an export."""

    slug: str
    options: Mapping[str, Any]
    args: QuantArgs
    inputs: QuantArgs | None = None
    written_as: str = "pack-quantized"
    rounded_by_export: bool = False  # the export changes the numbers, and reports it: it is compared with itself

    def keep(self, model: str, kind: str) -> list[str]:
        """Layers that must stay dense: stories260K is 172 wide inside, which is not a multiple of 32."""
        return ["*.mlp.*"] if model == "stories260K" and kind in ("gptq", "gptq_v2", "awq", "gguf") else []


def k_quant(bits: int, symmetric: bool, group: int) -> Weights:
    """GGUF's super-blocks of 256 columns."""
    options = {"formula": "ggml", "scale_dtype": "super"}
    args = QuantArgs(bits=bits, symmetric=symmetric, group_size=group, formula="ggml", scale_dtype="super")
    made = {"method": "rtn", "bits": bits, "group_size": group, "symmetric": symmetric, "options": options}
    return Weights(f"q{bits}_k", made, args, written_as="gguf-blocks")


def grid(bits: int, group: int, symmetric: bool = True) -> Weights:
    """Rounding to nearest: a format stores codes in the same way for every method."""
    slug = f"w{bits} g{group} {'sym' if symmetric else 'asym'}"
    strategy, size = group_strategy(group)
    args = QuantArgs(bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    return Weights(slug, {"method": "rtn", "bits": bits, "group_size": group, "symmetric": symmetric}, args)


WEIGHTS: dict[str, Weights] = {
    **{f"{bits} bits, groups of 32": grid(bits, 32) for bits in (2, 3, 4, 5, 8)},
    **{f"{bits} bits asymmetric, groups of 32": grid(bits, 32, symmetric=False) for bits in (2, 3, 4, 5, 8)},
    "4 bits, groups of 128": grid(4, 128),
    "4 bits, a scale per row": grid(4, -1),
    "4 bits asymmetric, a scale per row": grid(4, -1, symmetric=False),
    "8 bits, a scale per row": grid(8, -1),
    "W8A8, dynamic per token": Weights(
        "w8a8",
        {"method": "smoothquant"},
        signed_weights("channel"),
        inputs_per("token", dynamic=True),
        "int-quantized",
    ),
    "W8A8, static": Weights(
        "w8a8 static",
        {"method": "smoothquant", "options": {"level": "O3"}},
        signed_weights("tensor"),
        inputs_per("tensor", dynamic=False),
        "int-quantized",
    ),
    "W4A8, dynamic per token": Weights(
        "w4a8", {"method": "smoothquant", "bits": 4, "group_size": 32}, QuantArgs(), inputs_per("token", dynamic=True)
    ),
    "Q4_K": k_quant(4, False, 32),
    "Q6_K": k_quant(6, True, 16),
    "NF4, double quantization": Weights("nf4", {"method": "nf4"}, NF4, None, "bitsandbytes"),
    "LLM.int8": Weights(
        "llm-int8", {"method": "llm-int8"}, signed_weights("channel"), None, "llm-int8", rounded_by_export=True
    ),
}
SYMMETRIC, ASYMMETRIC = "4 bits, groups of 32", "4 bits asymmetric, groups of 32"


@dataclass(frozen=True)
class Environment:
    """A runtime's packages (installed without their dependencies), and the cells that are tried in it.

    `tried` maps formats to names of `WEIGHTS`, of which the first is tried with the second model too.
    """

    packages: str
    runtime: str
    tried: Mapping[str, tuple[str, ...]]

    def cells(self, first_only: bool) -> Iterator[tuple[str, str]]:
        """Format and weights of every cell."""
        for kind, weights in self.tried.items():
            yield from ((kind, each) for each in weights[: 1 if first_only else None])


GPTQMODEL = (
    "gptqmodel==7.7.0 optimum==2.3.0 threadpoolctl device-smi pypcre tokenicer logbar defuser torchao ninja maturin "
    "requests urllib3 charset-normalizer certifi"
)
ONNX = {
    "onnx": (SYMMETRIC, ASYMMETRIC, "8 bits, groups of 32", "8 bits asymmetric, groups of 32", "2 bits, groups of 32"),
}
GGUF = {
    "gguf": (
        SYMMETRIC,
        "4 bits, groups of 128",
        "4 bits, a scale per row",
        ASYMMETRIC,
        "5 bits, groups of 32",
        "5 bits asymmetric, groups of 32",
        "8 bits, groups of 32",
        "Q4_K",
        "Q6_K",
    )
}
ENVIRONMENTS: dict[str, Environment] = {
    "compressed-tensors 0.20": Environment(
        "compressed-tensors==0.20.0",
        "transformers",
        {
            "pack-quantized": (
                SYMMETRIC,
                "4 bits, groups of 128",
                "4 bits, a scale per row",
                "2 bits, groups of 32",
                "8 bits, a scale per row",
                "W4A8, dynamic per token",
                ASYMMETRIC,
            ),
            "int-quantized": ("W8A8, dynamic per token", "W8A8, static"),
        },
    ),
    "compressed-tensors 0.17": Environment(
        "compressed-tensors==0.17.0",
        "transformers",
        {"pack-quantized": (ASYMMETRIC, "4 bits asymmetric, a scale per row", SYMMETRIC)},
    ),
    "compressed-tensors 0.15": Environment(
        "compressed-tensors==0.15.0", "transformers", {"pack-quantized": (ASYMMETRIC,)}
    ),
    "bitsandbytes": Environment(
        "bitsandbytes==0.50.2",
        "bitsandbytes",
        {"bitsandbytes": ("NF4, double quantization", "8 bits, a scale per row", "LLM.int8")},
    ),
    "gptqmodel": Environment(
        GPTQMODEL,
        "transformers",
        {
            "gptq": (
                *(f"{bits} bits, groups of 32" for bits in (4, 2, 3, 8)),
                *(f"{bits} bits asymmetric, groups of 32" for bits in (4, 2, 3, 8)),
                "4 bits, groups of 128",
            ),
            "gptq_v2": (SYMMETRIC, ASYMMETRIC),
            "awq": (ASYMMETRIC, SYMMETRIC),
        },
    ),
    "gguf": Environment(
        "gguf==0.19.0",
        "gguf-transformers",
        GGUF,
    ),
    "llama.cpp": Environment(
        "llama-cpp-python==0.3.36 diskcache gguf==0.19.0",
        "llama.cpp",
        GGUF,
    ),
    "onnxruntime": Environment("onnx==1.23.2 onnxruntime==1.32.0 ml_dtypes protobuf flatbuffers", "onnxruntime", ONNX),
    "openvino": Environment(
        "onnx==1.23.2 openvino==2026.4.1 ml_dtypes protobuf", "openvino", {**ONNX, "openvino": ONNX["onnx"]}
    ),
    "mlx": Environment(
        "mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2",
        "mlx",
        {"awq": (SYMMETRIC, ASYMMETRIC), "gptq": (SYMMETRIC,), "pack-quantized": (SYMMETRIC,)},
    ),
}
