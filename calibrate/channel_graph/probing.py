"""Experiments on a block: run it with the input or output of one module scaled, and compare what the others read."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..runner import Call

TOLERANCE = 1e-5  # relative to the largest output: larger differences are not rounding errors


class Trial:
    """An unmodified run of the block: inputs, outputs and call order of its modules that have parameters, and its output.

    modules  by name, every module with parameters of its own
    order    norms and linears in the order in which they were called
    inputs   the first argument of each module; modules that were called several times are left out
    outputs  the outputs of norms and linears
    calls    all arguments of each module
    called   the modules that were called at all
    """

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor) -> None:
        self.block, self._call, self._hidden = block, call, hidden
        self.order: list[str] = []
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.modules = {n: m for n, m in block.named_modules() if n and any(True for _ in m.parameters(recurse=False))}
        runs: dict[str, int] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
                runs[name] = runs.get(name, 0) + 1
                first = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(first, Tensor):
                    self.inputs[name], self.calls[name] = first.clone(), (args, kwargs)
                if isinstance(output, Tensor) and (is_norm(module) or isinstance(module, nn.Linear | Conv1D)):
                    self.outputs[name] = output.clone()
                    self.order.append(name)

            return hook

        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_hook(note(name), with_kwargs=True).remove)
            self.output = self.run()
        self.called = set(runs)
        for name in [n for n, count in runs.items() if count > 1]:  # one of several calls is not representative
            self.inputs.pop(name, None)
            self.outputs.pop(name, None)
        self.order = [name for name in self.order if name in self.inputs and name in self.outputs]

    def run(self) -> Tensor:
        """The block's output `[rows, length, width]`, with the hooks that are in place now."""
        return self._call.replay(self.block, self._hidden)

    def sees_all_tokens(self, name: str) -> bool:
        """Whether the module reads as many tokens as the block; experts behind a router do not."""
        x = self.inputs[name]
        return x.numel() // x.shape[-1] == self._hidden.shape[0] * self._hidden.shape[1]

    def first_tokens(self, x: Tensor) -> Tensor:
        """The first token of every row `[rows, width]` of a module's input, which may be flattened to `[tokens, width]`."""
        rows, length, _ = self._hidden.shape
        return x.reshape(rows, length, -1)[:, 0]

    def record_inputs(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Run the block with the hooks that are in place now; the inputs of the modules `names`."""
        found: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found[name] = args[0] if args else next(iter(kwargs.values()))

            return hook

        with ExitStack() as stack:
            for name in names:
                handle = self.modules[name].register_forward_pre_hook(note(name), with_kwargs=True)
                stack.callback(handle.remove)
            self.run()
        return found


def is_norm(module: nn.Module) -> bool:
    """Whether the module's own parameters are a weight vector and at most a bias of the same length."""
    own = dict(module.named_parameters(recurse=False))
    shapes = {p.shape for p in own.values()}
    return "weight" in own and own.keys() <= {"weight", "bias"} and len(shapes) == 1 and own["weight"].ndim == 1


@contextmanager
def scaled_output(module: nn.Module, factor: Tensor) -> Iterator[None]:
    """While the context is open, the output of `module` is multiplied by `factor` `[width]`."""

    def scale(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * factor

    handle = module.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def scaled_input(module: nn.Module, factor: Tensor) -> Iterator[None]:
    """While the context is open, the first argument of `module` is multiplied by `factor` `[width]`."""

    def scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return map_first_argument(args, kwargs, lambda x: x * factor)

    handle = module.register_forward_pre_hook(scale, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def map_first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call arguments with the first one, positional or by keyword, replaced by its `change`."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, kwargs | {name: change(kwargs[name])}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference relative to the largest magnitude in `b`; infinite if the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    scale = float(b.abs().max())
    return float((a - b).abs().max()) / scale if scale else float((a != b).any())


def outputs_match(a: object, b: object) -> bool:
    """Whether two outputs of a module (tensors, nested tuples or lists) agree up to `TOLERANCE`."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return difference(a.float(), b.float()) < TOLERANCE
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(outputs_match(x, y) for x, y in zip(a, b, strict=True))
    return a == b
