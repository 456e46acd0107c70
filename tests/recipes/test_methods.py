"""The registry of methods: each record describes its method correctly, and fits the general code."""

import pytest

from lmpress.errors import UsageError
from lmpress.recipes.methods import AFTER_TRANSFORM, METHODS, TRAINED_BY, Family, Needs, method, method_names
from lmpress.recipes.naming import default_out
from lmpress.recipes.options.prune import PruneOptions
from lmpress.recipes.options.quantize import QuantizeOptions
from lmpress.recipes.schema import build
from lmpress.recipes.scheme.prune_args import Pruning


@pytest.mark.parametrize("name", METHODS)
def test_a_record_fits_its_line(name: str) -> None:
    known, entry = method(name), METHODS[name]
    assert (known.name, known.family) == (name, entry.family)
    assert entry.module.rpartition(".")[2] == name.replace("-", "_")
    assert known.apply.__module__ == known.config.__module__ == f"lmpress.compress.methods.{entry.module}"
    assert 20 <= len(entry.purpose) <= 90 and not entry.purpose.endswith(".")
    config = known.config()
    assert isinstance(config.needs, Needs) and isinstance(config.true_sequential, bool)
    assert hasattr(config, "scheme") is (known.family is not Family.TRANSFORM)
    assert (getattr(config, "scheme", None) is None) is (known.family in (Family.TRANSFORM, Family.RECONSTRUCT))
    assert isinstance(known.scheme, Pruning) is (known.family is Family.PRUNE)
    assert (known.scheme is None) is known.refines
    assert bool(known.kinds) is (known.kinds is not None), "an empty set supports nothing"


def test_a_purpose_that_promises_no_calibration_is_true() -> None:
    for name, entry in METHODS.items():
        if "no calibration" in entry.purpose:
            assert not method(name).config().needs.text, name
        elif entry.family in (Family.QUANTIZE, Family.PRUNE):
            assert method(name).config().needs.text, name


def test_a_recipe_needs_what_any_of_its_passes_needs() -> None:
    both = Needs(hessian=True, drift=True) | Needs(samples=True)
    assert both == Needs(hessian=True, drift=True, samples=True)
    assert both.text and Needs(trial=True, block_io=True).text
    assert not Needs().text and not Needs(trial=True).text


def test_the_passes_that_quantize_adds_belong_to_the_expected_families() -> None:
    assert method(AFTER_TRANSFORM).family is Family.QUANTIZE and not method(AFTER_TRANSFORM).config().needs.text
    assert method(TRAINED_BY).family is Family.RECONSTRUCT


@pytest.mark.parametrize("name", method_names(Family.QUANTIZE, Family.TRANSFORM))
@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_every_quantizer_has_a_recipe_by_its_name_alone(name: str, quality: str) -> None:
    recipe = QuantizeOptions(method=name, quality=quality).recipe()
    passes = [entry.method for entry in recipe.passes]
    expected = [name] if method(name).compresses else [name, AFTER_TRANSFORM]
    trained = quality == "best" and method(TRAINED_BY).supports(recipe.scheme.weights.kind)  # type: ignore[union-attr]
    assert passes == expected + [TRAINED_BY] * trained
    assert default_out("model", recipe).name.startswith(f"model-{name}-w")


@pytest.mark.parametrize("name", method_names(Family.PRUNE))
def test_every_pruning_method_has_a_recipe_by_its_name_alone(name: str) -> None:
    assert [entry.method for entry in PruneOptions(method=name).recipe().passes] == [name]
    with pytest.raises(UsageError, match=f"{name} is not a method of compress quantize"):
        QuantizeOptions(method=name).recipe()


@pytest.mark.parametrize("name", method_names(Family.RECONSTRUCT))
def test_a_pass_after_a_quantizer_is_not_a_recipe_by_itself(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not a method of compress quantize"):
        QuantizeOptions(method=name).recipe()
    with pytest.raises(UsageError, match=f"{name} is not a method of compress prune"):
        PruneOptions(method=name).recipe()
    with pytest.raises(UsageError, match=f"{name} has nothing to improve on"):
        build({"passes": [{"method": name}]})


@pytest.mark.parametrize("name", ["tune", "lkd"])
def test_a_pass_is_refused_after_weights_that_it_does_not_improve_on(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} does not improve on .* weights; put it after .*gptq"):
        build({"passes": [{"method": "spqr"}, {"method": name}]})
