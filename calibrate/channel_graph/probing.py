"""Experiments on a block: run it, scale what a module gives or reads, see who notices."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..runner import Call

TOLERANCE = 1e-5  # of the largest output: a difference above it is somebody else's


class Trial:
    """The block run once as it is: what its parameterised modules read and give, in what order, and its output."""

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
        for name in [
            name for name, count in runs.items() if count > 1
        ]:  # what one of several calls shows is not the rule
            self.inputs.pop(name, None)
            self.outputs.pop(name, None)
        self.order = [name for name in self.order if name in self.inputs and name in self.outputs]

    def run(self) -> Tensor:
        return self._call.replay(self.block, self._hidden)

    def sees_all_tokens(self, name: str) -> bool:
        """Whether the module reads every token, in order as far as its shape tells: experts behind a router do not."""
        x = self.inputs[name]
        return x.numel() // x.shape[-1] == self._hidden.shape[0] * self._hidden.shape[1]

    def first_tokens(self, x: Tensor) -> Tensor:
        """`[rows, width]` of a module's input, which may come flattened to `[rows * length, width]`."""
        rows, length, _ = self._hidden.shape
        return x.reshape(rows, length, -1)[:, 0]

    def record_inputs(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What the modules `names` read in a run under the hooks that are in place."""
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
    """Whether the parameters of its own are vectors of one length: a weight per channel, perhaps a bias."""
    own = dict(module.named_parameters(recurse=False))
    shapes = {p.shape for p in own.values()}
    return "weight" in own and own.keys() <= {"weight", "bias"} and len(shapes) == 1 and own["weight"].ndim == 1


@contextmanager
def scaled_output(module: nn.Module, factor: Tensor) -> Iterator[None]:
    def scale(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * factor

    handle = module.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def scaled_input(module: nn.Module, factor: Tensor) -> Iterator[None]:
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
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, kwargs | {name: change(kwargs[name])}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest value of `b`; infinite where shapes differ."""
    if a.shape != b.shape:
        return math.inf
    scale = float(b.abs().max())
    return float((a - b).abs().max()) / scale if scale else float((a != b).any())


def outputs_match(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return difference(a.float(), b.float()) < TOLERANCE
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(outputs_match(x, y) for x, y in zip(a, b, strict=True))
    return a == b
