"""The outputs and weights of a checkpoint in mlx-lm, which reads AWQ on any machine with an MLX backend, CPUs included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def mlx_outputs(
    checkpoint: Path, ids: Tensor, layers: list[str], keep: Callable[[str, Tensor], None]
) -> dict[str, Tensor]:
    """`logits` and `hidden.N` of `ids` in float32; `keep` is called with the name and weight of every layer."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]  (installed in a separate environment)
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    model, _ = load_model(checkpoint)
    model.set_dtype(mx.float32)
    modules = dict(model.named_modules())
    for name in layers:
        linear: Any = modules[name]
        width = linear.scales.shape[1] * linear.group_size if "scales" in linear else linear.weight.shape[1]
        keep(name, _torch(linear(mx.eye(width)) - linear(mx.zeros((1, width)))).T.contiguous())
    outputs: dict[str, Tensor] = {}
    blocks = model.model.layers
    for index, block in enumerate(blocks):
        blocks[index] = _recorded(block, lambda value, index=index: outputs.update({f"hidden.{index}": _torch(value)}))
    return outputs | {"logits": _torch(model(mx.array(ids.numpy())))}


def _recorded(block: Any, record: Callable[[Any], None]) -> Any:
    """`block` with `record` called on every output. Python looks `__call__` up on the class, so the class is replaced."""

    class Recorded(type(block)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            output = super().__call__(*args, **options)
            record(output)
            return output

    block.__class__ = Recorded
    return block


def _torch(values: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(values, dtype=np.float32))
