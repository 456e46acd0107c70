"""What the linear layers of a block read on the calibration rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .runner import Call

Batch = tuple[Call, Tensor, Tensor | None]  # how the block is called, hidden states [rows, length, width], token mask
LINEAR = (nn.Linear, Conv1D)


def inputs_seen(
    block: nn.Module, batches: Iterable[Batch], names: Sequence[str], limit: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """For every batch, what the linears `names` of `block` read `[tokens, width]`, real tokens only; until `limit` tokens."""
    seen = 0
    for call, hidden, mask in batches:
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in names:
                hooks.callback(block.get_submodule(name).register_forward_pre_hook(_noting(found, name, mask)).remove)
            call.replay(block, hidden)
        yield found
        seen += hidden.shape[0] * hidden.shape[1]
        if limit is not None and seen >= limit:
            return


def tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` `[..., width]` as `[real tokens, width]`; what does not have the mask's shape (routed tokens) counts in full."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or mask.numel() != flat.shape[0]:
        return flat
    return flat[mask.reshape(-1).bool()]


def _noting(
    found: dict[str, Tensor], name: str, mask: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = tokens(args[0], mask)

    return note
