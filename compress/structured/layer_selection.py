"""Selection of the layers to keep: at fixed places, by how much they change the hidden states, or by the model's KL divergence.

spread      keeps evenly spaced layers and the last one (XTC, Wu et al. 2022: 12 -> 6 keeps 1, 3, 5, 7, 9, 11)
first, last removes the layers at that end
influence   removes the layers that change the hidden states least: `1 - mean cos(h_in, h_out)` (ShortGPT, Men et al. 2024)
angular     removes neighbours with the least `mean arccos(cos(h_in, h_out)) / pi` together (Gromov et al. 2024)
greedy      removes one layer at a time, the one whose absence costs least KL divergence to the whole model
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...calibrate.activation_store import ActivationStore
from ...calibrate.data.token_rows import TokenRows
from ...calibrate.model.architecture import find_blocks
from ...calibrate.model.skeleton import build
from ...calibrate.model.source import Source
from ...calibrate.runner import Runner
from ...errors import UsageError
from ..load import load
from ..report.progress import Event, Observer, silent

SELECTIONS = ("spread", "first", "last", "influence", "angular", "greedy")
BATCH = 4  # rows at a time through the whole model


def select_layers(
    how: str,
    count: int,
    source: Source,
    rows: TokenRows,
    scratch: Path,
    device: str = "cpu",
    observer: Observer = silent,
) -> list[int]:
    """The numbers of `count` layers of `source` to keep, rising, selected by `how`, which may use the calibration `rows`.

    Raises `UsageError` for an unknown selection and for a count that keeps no layer or all of them.
    """
    model = build(source)
    layers = len(find_blocks(model)[1])
    check_selection(how, count, layers)
    dropped = layers - count
    if how == "greedy":
        return greedy_selection(load(source.path, device), rows.ids, dropped, observer)
    if how == "influence":
        turns = layer_distances(Runner(model, source, rows, scratch, device), 1, lambda cosine: 1 - cosine, observer)
        order = sorted(range(layers), key=lambda layer: (turns[layer], layer))
        return sorted(order[dropped:])
    if how == "angular":
        angles = layer_distances(Runner(model, source, rows, scratch, device), dropped, _angle, observer)
        first = min(range(len(angles)), key=lambda layer: (angles[layer], layer))
        return [layer for layer in range(layers) if not first <= layer < first + dropped]
    return fixed_selection(how, count, layers)


def check_selection(how: str, count: int, layers: int) -> None:
    """Raise `UsageError` for an unknown selection and for a count that keeps no layer or all of them."""
    if how not in SELECTIONS:
        raise UsageError(f"unknown --choice {how!r}", f"use one of: {', '.join(SELECTIONS)}")
    if not 0 < count < layers:
        raise UsageError(f"{count} of {layers} layers cannot be kept", f"give a number between 1 and {layers - 1}")


def fixed_selection(how: str, count: int, layers: int) -> list[int]:
    """`count` of `layers` layers at fixed places: `spread`, `first` or `last`."""
    if how == "first":
        return list(range(layers - count, layers))
    if how == "last":
        return list(range(count))
    return [(place + 1) * layers // count - 1 for place in range(count)]


def layer_distances(
    runner: Runner, apart: int, measure: Callable[[Tensor], Tensor], observer: Observer = silent
) -> list[float]:
    """How much layers `l .. l + apart - 1` together change the hidden states, for every `l`: the mean of `measure` over tokens.

    `measure` takes the cosines `[tokens]` between input and output, before any final norm.
    """
    runner.capture()
    count = len(runner.blocks)
    window: list[ActivationStore] = []
    found = []
    for boundary in range(count + 1):
        store = ActivationStore(runner.scratch / f"boundary-{boundary}")
        sums = torch.zeros(2, dtype=torch.float64)
        for i, (_, hidden, mask) in enumerate(runner.samples(min(boundary, count - 1))):
            store[i] = hidden
            if len(window) == apart:
                cosine = torch.cosine_similarity(window[0][i].to(hidden.device), hidden, dim=-1)
                values = measure(cosine if mask is None else cosine[mask.bool()])
                sums += torch.tensor([float(values.double().sum()), values.numel()], dtype=torch.float64)
        if len(window) == apart:
            found.append(float(sums[0] / sums[1]))
        window = [*window, store][-apart:]
        if boundary < count:
            runner.load(boundary)
            runner.forward(boundary)
            runner.unload(boundary)
            observer(Event("block", boundary, count))
    return found


@torch.inference_mode()
def greedy_selection(model: PreTrainedModel, ids: Tensor, dropped: int, observer: Observer = silent) -> list[int]:
    """The layers of `model` that stay when `dropped` are removed one by one, each time the one whose absence costs least KL.

    The divergence is over all tokens of `ids` `[rows, length]`; of equal layers the later one is removed.
    """
    kept = list(range(len(find_blocks(model)[1])))
    whole = [model(part.to(model.device), use_cache=False).logits.log_softmax(-1) for part in ids.split(BATCH)]
    for step in range(dropped):
        costs = {}
        for layer in kept:
            rest = [other for other in kept if other != layer]
            with only_layers(model, rest):
                costs[layer] = _divergence(model, ids, whole)
        kept.remove(min(kept, key=lambda layer: (costs[layer], -layer)))
        observer(Event("block", step, dropped))
    return kept


@contextmanager
def only_layers(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[None]:
    """While the context is open, `model` runs only the blocks `kept` (without a cache, as they keep their numbers)."""
    prefix, blocks = find_blocks(model)
    parent, _, leaf = prefix.rpartition(".")
    config: Any = model.config.get_text_config()
    count = config.num_hidden_layers
    lists = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    owner = model.get_submodule(parent)
    setattr(owner, leaf, nn.ModuleList(blocks[i] for i in kept))
    for key, value in lists.items():
        setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    try:
        yield
    finally:
        setattr(owner, leaf, blocks)
        config.num_hidden_layers = count
        for key, value in lists.items():
            setattr(config, key, value)


def _divergence(model: PreTrainedModel, ids: Tensor, whole: Sequence[Tensor]) -> float:
    total = 0.0
    for part, base in zip(ids.split(BATCH), whole, strict=True):
        own = model(part.to(model.device), use_cache=False).logits.log_softmax(-1)
        total += float((base.exp() * (base - own)).sum())
    return total / ids.numel()


def _angle(cosine: Tensor) -> Tensor:
    return cosine.clamp(-1, 1).arccos() / torch.pi
