"""Progress of a long run: a stream of events, rendered by the command line and the log file."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Event:
    """`phase` of block `block` out of `blocks` (counted from 0); `figures` are those of the layer `layer`, if any.

    Phases in order: `plan`, `resume` (if an earlier run left finished blocks; `block` is the first that is not), `capture`,
    then per block `load`, `collect`, `solve` (one event per finished layer), `forward`, `write`, `block` (finished), and at the
    end `assemble` and `done`. `warning` events carry `message` and may come anywhere.
    """

    phase: str
    block: int = 0
    blocks: int = 0
    layer: str | None = None
    message: str | None = None
    figures: dict[str, float | int | str] = field(default_factory=dict)


Observer = Callable[[Event], None]


def silent(event: Event) -> None:
    """An observer that ignores every event."""
