"""What the tests of the compiled kernels share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture
def with_threads() -> Iterator[Callable[[Callable[[], Tensor]], list[Tensor]]]:
    """Gives the results of a function of no arguments with 1, 2 and 5 threads."""
    before = torch.get_num_threads()

    def results(compute: Callable[[], Tensor]) -> list[Tensor]:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute())
        return found

    yield results
    torch.set_num_threads(before)
