"""Recipes: flags, YAML and Python build the same recipe; errors name the mistake and the likely intention."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmpress.cli import app
from lmpress.compress.methods.quantize.gptq import GPTQ
from lmpress.compress.methods.quantize.rtn import RTN
from lmpress.compress.run import Run
from lmpress.errors import UsageError
from lmpress.recipes.options.prune import PruneOptions
from lmpress.recipes.options.quantize import QuantizeOptions
from lmpress.recipes.schema import Recipe, build, configure, dump, parse, read, shipped
from lmpress.recipes.scheme import QuantArgs, Scheme

ROOT = Path(__file__).parents[2]
YAML = """
passes:
  - method: gptq
    scheme: {weights: {bits: 3, symmetric: false, group_size: 64, observer: mse}}
    damping: 0.05
    order: group
calibration: {data: text.txt, samples: 7, seq_len: 99}
keep: ["*.down_proj"]
seed: 5
"""
PLAIN = [name for name, text in shipped().items() if "stages:" not in text]
WEIGHTS = QuantArgs(3, False, "group", 64, observer="mse")


def from_python() -> Recipe:
    return QuantizeOptions(
        method="gptq",
        bits=3,
        group_size=64,
        symmetric=False,
        calib="text.txt",
        samples=7,
        seq_len=99,
        seed=5,
        keep=["*.down_proj"],
        quality="fast",
        options={"observer": "mse", "damping": 0.05, "order": "group"},
    ).recipe()


def test_yaml_and_python_build_the_same_recipe() -> None:
    recipe = parse(YAML, "here")
    assert recipe == from_python()
    assert recipe.passes[0].config == GPTQ(Scheme(WEIGHTS), damping=0.05, order="group")


def test_flags_build_the_same_recipe(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 300)
    out, data = tmp_path / "out", str(tmp_path / "text.txt")
    flags = "--bits 2 --group-size 8 --asymmetric --samples 7 --seq-len 20 --seed 5 --keep *.down_proj"
    options = "--set observer=mse --set damping=0.05 --set order=group --quiet"
    command = f"quantize {tiny} -o {out} {flags} {options} --calib {data}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    expected = QuantizeOptions(
        bits=2,
        group_size=8,
        symmetric=False,
        calib=data,
        samples=7,
        seq_len=20,
        seed=5,
        keep=["*.down_proj"],
        options={"observer": "mse", "damping": 0.05, "order": "group"},
    ).recipe()
    assert read(out / "recipe.yaml") == expected
    again = CliRunner().invoke(
        app, ["run", str(tiny), "--recipe", str(out / "recipe.yaml"), "-o", str(tmp_path / "again"), "--quiet"]
    )
    assert again.exit_code == 0, again.output
    assert all((tmp_path / "again" / f.name).read_bytes() == f.read_bytes() for f in out.iterdir())


@pytest.mark.parametrize("recipe", [parse(YAML, "here"), QuantizeOptions(method="rtn").recipe(), *map(read, PLAIN)])
def test_dump_and_parse_are_inverse(recipe: Recipe) -> None:
    text = dump(recipe)
    assert parse(text, "dumped") == recipe
    assert dump(parse(text, "dumped")) == text
    option = "observer:" if isinstance(recipe.scheme, Scheme) else "scope:"
    assert option in text and "seed:" in text  # every option is written out
    assert build(json.loads(recipe.model_dump_json())) == recipe


@pytest.mark.parametrize("name", PLAIN)
def test_every_shipped_recipe_begins_with_its_purpose(name: str) -> None:
    assert shipped()[name].startswith("# ")
    assert read(name).weights("model.layers.0.self_attn.q_proj") is not None


def test_shipped_recipes_equal_the_defaults_of_their_methods() -> None:
    assert {"gptq-w4", "gptq-w3", "rtn-w4"} <= shipped().keys()
    assert read("gptq-w4") == QuantizeOptions().recipe()
    assert read("rtn-w4") == QuantizeOptions(method="rtn").recipe()
    assert read("spqr-w4") == QuantizeOptions(method="spqr").recipe()
    assert read("exactobs-s50") == PruneOptions(format="bitmask").recipe()


@pytest.mark.parametrize("name", PLAIN)
def test_every_shipped_recipe_fits_the_sample_model(name: str) -> None:
    planned = Run.of(ROOT / "examples" / "sample_model", read(name)).plan
    assert planned.bytes_after < planned.bytes_before


def test_a_group_size_of_minus_one_means_one_scale_per_row() -> None:
    assert QuantizeOptions(group_size=-1).recipe().scheme.weights == QuantArgs(4, True, "channel", None, observer="mse")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gtpq"}, "unknown method 'gtpq'; did you mean gptq"),
        ({"method": "zzz"}, "unknown method 'zzz'; methods: .*gptq, "),
        ({"method": "wanda"}, "wanda is not a method of compress quantize; use one of: .*gptq"),
        ({"method": "tune"}, "tune is not a method of compress quantize"),
        ({"options": {"dampling": 1}}, "gptq has no option 'dampling'; did you mean damping"),
        ({"method": "rtn", "options": {"damping": 1}}, "rtn has no option 'damping'; known: scheme"),
        ({"options": {"order": "sideways"}}, "gptq: order"),
        ({"options": {"damping": "much"}}, "gptq: damping"),
        ({"options": {"damping": -1}}, "damping must be at least 0, got -1.0"),
        ({"options": {"observer": "best"}}, "observer"),
        ({"bits": 1}, r"bits 1 is outside 2\.\.8"),
        ({"bits": 9}, r"bits 9 is outside 2\.\.8"),
        ({"group_size": 0}, "group size 0 is not usable; use a multiple of 8"),
        ({"group_size": 7}, "group size 7 is not usable; use a multiple of 8"),
        ({"group_size": -2}, "group size -2 is not usable"),
        ({"samples": 0}, "samples"),
        ({"seq_len": 1}, "seq_len"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeOptions(**changes).recipe()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [", "here is not valid YAML"),
        ("- gptq", "here is not a recipe; it must be a mapping"),
        ("", "here is not a recipe"),
        ("passes: []", "here: passes"),
        ("seed: 1", "here: passes"),
        ("passes: [{bits: 4}]", "has no method"),
        ("passes: [gptq]", "here: passes.0"),
        ("passes: [{method: gptq}]\nsamples: 5", "here: samples"),
        ("passes: [{method: gptq}]\ncalibration: {sample: 5}", "here: calibration.sample"),
        ("passes: [{method: gptq, scheme: {weights: {bits: 9}}}]", "bits 9 is outside"),
        ("passes: [{method: gptq, scheme: {weights: {bit: 4}}}]", "gptq: scheme.weights.bit"),
        ("passes: [{method: gptq, scheme: {weights: {group_size: 0}}}]", "group size 0 is not"),
        ("passes: [{method: [gptq]}]", "has no method"),
        ("seed: 2024-99-99", "here is not valid YAML: month"),
        ("[" * 5000 + "]" * 5000, "here is not valid YAML: .*nested"),
        ("seed: 1\nseed: 2", "here is not valid YAML: the key 'seed' occurs twice"),
    ],
)
def test_wrong_recipes_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 99}, "bits 99 is outside"),
        ({"bits": "four"}, r"override '\*\.q' *: bits"),
        ({"bit": 3}, r"override '\*\.q' sets bit, which weights do not have"),
        ({"strategy": "channel"}, "'channel' has no groups, but group_size is 128"),
    ],
)
def test_wrong_overrides_are_named_with_the_layer(changes: dict[str, object], message: str) -> None:
    recipe = build({"passes": [{"method": "rtn"}], "overrides": {"*.q": changes}})
    assert recipe.weights("layer.k") == QuantArgs()
    with pytest.raises(UsageError, match=message):
        recipe.weights("layer.q")


def test_recipes_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gptq-w5: no such recipe; did you mean gptq-w"):
        read("gptq-w5")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.yaml is not UTF-8"):
        read(tmp_path / "binary.yaml")


def test_keep_and_overrides_by_pattern_the_later_wins() -> None:
    recipe = parse(
        """
passes: [{method: rtn}]
keep: ["*.lm_head", "*.0.*"]
overrides:
  "*.down_proj": {bits: 8, strategy: channel, group_size: null}
  "*.3.mlp.*": {bits: 6}
""",
        "here",
    )
    assert recipe.weights("model.layers.0.mlp.down_proj") is None
    assert recipe.weights("model.layers.1.mlp.up_proj") == QuantArgs()
    assert recipe.weights("model.layers.1.mlp.down_proj") == QuantArgs(8, True, "channel", None)
    assert recipe.weights("model.layers.3.mlp.down_proj") == QuantArgs(6, True, "channel", None)
    assert parse(dump(recipe), "dumped") == recipe


def test_options_become_the_methods_own_config() -> None:
    assert configure("rtn", {"scheme": {"weights": {"bits": 2}}}) == RTN(Scheme(QuantArgs(2)))
    assert configure("gptq", {}) == GPTQ()
