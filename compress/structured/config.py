"""The config of a model with fewer layers: every entry about single layers is adapted to the layers that are kept.

There is no table of architectures. Lists with one entry per layer lose entries, lists of layer numbers are renumbered, counts
of leading layers are counted again; then student and teacher are built as skeletons and compared block by block, and a
selection that the config cannot express is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...calibrate.model.architecture import find_blocks
from ...errors import UsageError

# Entries that count layers from the start: the first k are dense, the first k have full attention.
LEADING = ("first_k_dense_replace", "max_window_layers")
PRIMITIVE = (bool, int, float, str, type(None))
NUMBERED = ("layer_idx", "layer_id", "block_idx")  # attributes that hold a module's own layer number


def config_of_layers(config: Mapping[str, Any], parsed: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The content of config.json for a model of the layers `kept`, in that order; `config` and `parsed` are the teacher's.

    Entries that transformers derives when it reads the config (such as `layer_types`) are written out, so that they are not
    derived again. Raises `UsageError` for models that compute with the number of a layer.
    """
    text = parsed.get_text_config()
    count: int = text.num_hidden_layers
    if any(value is True for key, value in vars(text).items() if "layer_idx" in key):
        raise UsageError(
            "this model computes with the number of a layer, which would change", "its layers cannot be removed"
        )
    known = {key: value for key, value in text.to_dict().items() if not key.startswith("_")}
    changes = {key: new for key, value in known.items() if (new := _for_kept_layers(key, value, count, kept)) != value}
    if "attention_types" in known:  # GPT-Neo's form: [[kinds, how often], ...]
        changes["attention_types"] = [[changes.get("attention_layers", known["attention_layers"]), 1]]
    changes[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    return _merged(config, changes, parsed)


def check_same_blocks(teacher: PreTrainedModel, student: PreTrainedModel, kept: Sequence[int]) -> None:
    """Raise `UsageError` if block `i` of the `student` is not built like block `kept[i]` of the `teacher`."""
    blocks = find_blocks(teacher)[1]
    for new, old in enumerate(kept):
        difference = _difference(blocks[old], find_blocks(student)[1][new])
        if difference:
            raise UsageError(
                f"layer {old} cannot become layer {new}: its {difference}, and the config cannot express that",
                "keep layers whose new place has the same kind, such as whole periods of the pattern",
            )


def _for_kept_layers(key: str, value: Any, count: int, kept: Sequence[int]) -> Any:
    if key in LEADING and isinstance(value, int):
        return sum(old < value for old in kept)
    if not isinstance(value, list | tuple) or not value:
        return value
    numbers = all(type(entry) is int for entry in value)
    if numbers and _are_layers(key, value, count):
        return [new for new, old in enumerate(kept) if old in value]
    return [value[old] for old in kept] if len(value) == count else value


def _are_layers(key: str, values: Sequence[int], count: int) -> bool:
    """Whether the numbers under `key` are layers' own numbers: distinct, rising and none too large."""
    named = any(word in key for word in ("layer", "idx", "indices", "ids"))
    return named and list(values) == sorted(set(values)) and values[0] >= 0 and values[-1] < count


def _merged(config: Mapping[str, Any], changes: Mapping[str, Any], parsed: PreTrainedConfig) -> dict[str, Any]:
    """`config` with the changes applied to the language model's entries: at the top or in a nested config."""
    if parsed.get_text_config() is parsed:
        return {**config, **changes}
    inner = next(key for key in config if getattr(parsed, key, None) is parsed.get_text_config())
    return {**config, inner: {**config[inner], **changes}}


def _difference(old: nn.Module, new: nn.Module) -> str | None:
    """The first difference of two blocks in tensors, kinds of modules and plain attributes; None if there is none."""
    shapes = [{name: tuple(p.shape) for name, p in block.state_dict(keep_vars=True).items()} for block in (old, new)]
    if shapes[0] != shapes[1]:
        name = next(iter(sorted(shapes[0].items() ^ shapes[1].items())))[0]
        return f"{name} would have another shape or be missing"
    for (name, a), (_, b) in zip(old.named_modules(), new.named_modules(), strict=True):
        if type(a) is not type(b):
            return f"{name or 'block'} would be a {type(b).__name__} instead of a {type(a).__name__}"
        differing = sorted(key for key, value in _plain(a) if value != getattr(b, key, None))
        if differing:
            key = differing[0]
            return f"{name or 'block'}.{key} would be {getattr(b, key, None)!r} instead of {getattr(a, key)!r}"
    return None


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    return [
        (key, value)
        for key, value in vars(module).items()
        if isinstance(value, PRIMITIVE) and key not in NUMBERED and not key.startswith("_")
    ]
