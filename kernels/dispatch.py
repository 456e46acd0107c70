"""Which kernel serves: the first of the list that meets the need, runs here and passes its self-test.

On GPUs the Triton kernels serve. The chain on CPUs: compiled kernels, best instruction set first; torch's int4 product if
int8 activations were allowed; dequantizing. The last one always runs, anywhere, so no machine is an error.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..errors import UsageError
from . import ops, reference, selftest, torch_int4  # noqa: F401  (ops registers the operators)
from .cpu import product
from .kernel import Kernel, KernelSpec, Unavailable, WrongMachine
from .triton.product import TRITON

KERNELS: tuple[Kernel, ...] = (*product.KERNELS, TRITON, torch_int4.INT4, reference.REFERENCE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """Why a kernel does not serve; `worth_warning` if that is not a property of the layer or of the hardware."""

    reason: str
    worth_warning: bool


@dataclass(frozen=True)
class Choice:
    """The kernel that serves, and those tried before it with the reason why each does not."""

    kernel: Kernel
    passed_over: tuple[tuple[str, Refusal], ...] = ()

    def __str__(self) -> str:
        """The name, and in parentheses why others were passed over."""
        skipped = [f"{name}: {refusal.reason}" for name, refusal in self.passed_over]
        return self.kernel.name + (f" ({'; '.join(skipped)})" if skipped else "")


def choose(need: KernelSpec, kernel: str | None = None, kernels: Sequence[Kernel] = KERNELS) -> Choice:
    """The first of `kernels` that may serve `need`, or the one named `kernel` and no other.

    Raises `UsageError` if the named one is unknown or may not serve.
    """
    if kernel is not None:
        return Choice(_named(kernel, need, kernels))
    passed_over: list[tuple[str, Refusal]] = []
    for candidate in kernels:
        refused = refusal(candidate, need)
        if refused is None:
            _warn_about(candidate, passed_over)
            return Choice(candidate, tuple(passed_over))
        passed_over.append((candidate.name, refused))
    reasons = "; ".join(f"{name}: {refused.reason}" for name, refused in passed_over)
    raise UsageError(f"no kernel serves {need}: {reasons}")


@cache
def refusal(kernel: Kernel, need: KernelSpec) -> Refusal | None:
    """Why `kernel` may not serve `need` on this machine, or None if it may. The answer is found once per process."""
    if reason := kernel.serves.refusal(need):
        return Refusal(reason, worth_warning=False)
    try:
        failed = selftest.failure(kernel, need)
    except Unavailable as error:
        return Refusal(str(error), worth_warning=not isinstance(error, WrongMachine))
    return Refusal(failed, worth_warning=True) if failed else None


def _named(name: str, need: KernelSpec, kernels: Sequence[Kernel]) -> Kernel:
    found = next((kernel for kernel in kernels if kernel.name == name), None)
    if found is None:
        raise UsageError(f"no kernel is called {name!r}", f"there are {', '.join(kernel.name for kernel in kernels)}")
    if refused := refusal(found, need):
        raise UsageError(f"kernel {name!r} cannot serve this layer here: {refused.reason}")
    return found


def _warn_about(chosen: Kernel, passed_over: Sequence[tuple[str, Refusal]]) -> None:
    reasons = dict.fromkeys(refused.reason for _, refused in passed_over if refused.worth_warning)
    for reason in reasons:
        _warn_once(f"{reason}; {chosen.name} serves instead")


@cache
def _warn_once(message: str) -> None:
    """Log each message once, however many layers it is about."""
    logger.warning(message)
