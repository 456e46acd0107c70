"""Values in config.json that transformers refuses or that the weight files cannot hold: one error with file, key and value."""

import json
from pathlib import Path

import pytest

from lmpress.calibrate.model.config import config_of
from lmpress.calibrate.model.skeleton import build
from lmpress.compress.formats.source import open_source
from lmpress.errors import UsageError


def change(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "x"}, "hidden_size"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings"),
        ({"hidden_act": "x"}, "hidden_act is 'x', which transformers does not know"),
        ({"rope_parameters": {"rope_type": "x"}}, "rope_parameters.rope_type is 'x'"),
        ({"rope_parameters": 3}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"num_attention_heads": 3}, "num_attention_heads|attention heads"),
        ({"dtype": "x"}, "dtype|torch"),
        ({"quantization_config": 3}, ""),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_values_that_transformers_refuses_are_named(tiny: Path, changes: dict[str, object], message: str) -> None:
    change(tiny, **changes)
    with pytest.raises(UsageError, match=rf"config\.json does not describe .*supports: .*({message})") as raised:
        build(open_source(tiny))
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads"]
)
@pytest.mark.parametrize("value", [-1, 10**9, 10**30])
def test_sizes_are_compared_with_the_weight_files(tiny: Path, name: str, value: int) -> None:
    change(tiny, **{name: value})
    with pytest.raises(UsageError, match=rf"config\.json: {name} is {value}, and the weight files have room for"):
        config_of(open_source(tiny))


def test_sizes_inside_the_config_of_a_part_are_compared_too(tiny: Path) -> None:
    change(tiny, text_config={"num_hidden_layers": 10**9})
    with pytest.raises(UsageError, match=r"text_config\.num_hidden_layers is 1000000000"):
        config_of(open_source(tiny))
