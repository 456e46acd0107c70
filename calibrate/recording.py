"""Recording the inputs of a block's linear layers on the calibration rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .runner import Call

Batch = tuple[Call, Tensor, Tensor | None]  # call arguments, hidden states [rows, length, width], mask of real tokens
LINEAR = (nn.Linear, Conv1D)


def inputs_seen(
    block: nn.Module, batches: Iterable[Batch], names: Sequence[str], limit: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """For every batch, the inputs `[real tokens, width]` of the linears `names` of `block`; stops after `limit` tokens."""
    count = 0
    for call, hidden, mask in batches:
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in names:
                hook = block.get_submodule(name).register_forward_pre_hook(_record_input(found, name, mask))
                hooks.callback(hook.remove)
            call.replay(block, hidden)
        yield found
        count += hidden.shape[0] * hidden.shape[1]
        if limit is not None and count >= limit:
            return


def tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` `[..., width]` as `[real tokens, width]`; all tokens if their number is not the mask's (tokens routed to experts)."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or mask.numel() != flat.shape[0]:
        return flat
    return flat[mask.reshape(-1).bool()]


def _record_input(
    found: dict[str, Tensor], name: str, mask: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = tokens(args[0], mask)

    return record
