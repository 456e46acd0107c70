"""The state of a training on disk, from which a killed run resumes bit for bit. No pickles."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...calibrate.model import safetensors_io

STATE, BEST = "state.safetensors", "best.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class History(Protocol):
    """The figures of the checks so far."""

    curve: list[tuple[int, float, float]]
    best_step: int


@dataclass(frozen=True)
class TrainingState:
    """The folder of one training. Files are written whole or not at all."""

    folder: Path

    def save(self, step: int, named: Mapping[str, nn.Parameter], optimiser: Optimizer, history: History) -> None:
        """Write parameters, moments and history after `step` updates, in one file."""
        tensors = {f"weight/{name}": p.detach() for name, p in named.items()}
        for name, parameter in named.items():
            moments: dict[str, Tensor] = optimiser.state.get(parameter, {})
            tensors |= {f"{kind}/{name}": moments[kind] for kind in MOMENTS if kind in moments}
        notes = json.dumps({"step": step, "curve": history.curve, "best_step": history.best_step}).encode()
        tensors["notes"] = torch.frombuffer(bytearray(notes), dtype=torch.uint8)
        safetensors_io.write(self.folder / STATE, {name: t.cpu().contiguous() for name, t in tensors.items()})

    def resume(self, named: Mapping[str, nn.Parameter], optimiser: Optimizer, history: History) -> int:
        """Load a saved state into parameters, optimiser and history; the number of updates done, 0 if none was saved."""
        if not (self.folder / STATE).exists():
            return 0
        tensors = safetensors_io.read(self.folder / STATE)
        notes: dict[str, Any] = json.loads(tensors.pop("notes").numpy().tobytes())
        _put(named, {name.removeprefix("weight/"): t for name, t in tensors.items() if name.startswith("weight/")})
        for name, parameter in named.items():
            found = {kind: tensors[f"{kind}/{name}"] for kind in MOMENTS if f"{kind}/{name}" in tensors}
            if found:
                optimiser.state[parameter] = {
                    kind: t if kind == "step" else t.to(parameter.device) for kind, t in found.items()
                }
        history.curve[:] = [(int(step), loss, kl) for step, loss, kl in notes["curve"]]
        history.best_step = notes["best_step"]
        return notes["step"]

    def keep_best(self, named: Mapping[str, nn.Parameter]) -> None:
        """Write the parameters as the best so far."""
        safetensors_io.write(self.folder / BEST, {name: p.detach().cpu().contiguous() for name, p in named.items()})

    def restore_best(self, named: Mapping[str, nn.Parameter]) -> None:
        """Load the best parameters."""
        _put(named, safetensors_io.read(self.folder / BEST))


@torch.no_grad()
def _put(named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        parameter.copy_(tensors[name])
