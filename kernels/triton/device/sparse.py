"""y + x S^T for S in compressed rows: a program adds up the entries of one row of S, so that no two write to one element."""

import triton
import triton.language as tl


@triton.jit
def add_sparse(y, x, starts, columns, values, total, m, n, width, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """total float32 `[m, n]` = `y` float32 `[m, n]` plus `x` `[m, width]` times the rows of S."""
    row = tl.program_id(0)
    batch = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch_ok = batch < m
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    x += batch.to(tl.int64)[:, None] * width
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for at in range(first, last, BLOCK_E):
        entry = at + tl.arange(0, BLOCK_E)
        there = entry < last
        column = tl.load(columns + entry, mask=there, other=0)
        value = tl.load(values + entry, mask=there, other=0.0)
        sums += value[None, :] * tl.load(x + column[None, :], mask=batch_ok[:, None] & there[None, :], other=0.0).to(
            tl.float32
        )
    place = batch.to(tl.int64) * n + row
    before = tl.load(y + place, mask=batch_ok, other=0.0)
    tl.store(total + place, before + tl.sum(sums, axis=1), mask=batch_ok)
