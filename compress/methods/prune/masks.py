"""Masks of the smallest scores, counted by the scope or the pattern of `PruneArgs`; of equal scores the first is pruned."""

from dataclasses import replace

import torch
from torch import Tensor

from ....recipes.scheme import PruneArgs
from ....recipes.scheme.prune_args import SCOPE_BLOCK, block_zeros, layer_zeros


def smallest(scores: Tensor, args: PruneArgs) -> Tensor:
    """Mask bool `[out, in]` of exactly `args.zeros(out, in)` pruned weights, those of the smallest `scores` `[out, in]`."""
    if args.block > 1:  # whole blocks, by the sums of their scores
        sums = scores.unflatten(1, (-1, args.block)).sum(2)
        return smallest(sums, replace(args, pattern=None)).repeat_interleave(args.block, dim=1)
    if args.n_of_m is not None:
        return in_groups(scores, args.n_of_m)
    if args.scope == "row":
        return lowest(scores, int(scores.shape[1] * args.sparsity))
    if args.scope == "block":
        return torch.cat([in_block(part, args.sparsity) for part in scores.split(SCOPE_BLOCK, dim=1)], dim=1)
    return lowest(scores.reshape(1, -1), layer_zeros(scores.numel(), args.sparsity)).view_as(scores)


def in_block(scores: Tensor, sparsity: float) -> Tensor:
    """The mask of SparseGPT, chosen among all `scores` `[out, columns]`."""
    return lowest(scores.reshape(1, -1), block_zeros(scores.numel(), sparsity)).view_as(scores)


def in_groups(scores: Tensor, pattern: tuple[int, int]) -> Tensor:
    """The `n` smallest of every `m` neighbouring columns; `r * n // m` of a last group of `r` columns."""
    zeros, group = pattern
    whole = scores.shape[1] // group * group
    mask = lowest(scores[:, :whole].reshape(-1, group), zeros).view(len(scores), whole)
    rest = scores[:, whole:]
    return torch.cat([mask, lowest(rest, rest.shape[1] * zeros // group)], dim=1)


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` smallest entries of every row, as a mask."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)
