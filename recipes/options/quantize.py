"""The options of `quantize`, and the recipe that they stand for."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

from ...errors import UsageError
from .. import schema
from ..fields import Flag
from ..methods import AFTER_TRANSFORM, TRAINED_BY, Family, Method, method_names
from ..methods import method as find_method
from ..schema import Recipe
from ..scheme import LEVELS, Scheme, group_strategy
from .calibration import CalibrationOptions, split
from .offered import find_offered

INPUT_OPTIONS = ("threshold",)
GRID_OPTIONS = ("observer", "formula", "scale_dtype", "symmetric", "outliers")
FAMILIES = (Family.QUANTIZE, Family.TRANSFORM)
LEVEL = "level"  # SmoothQuant's O1, O2, O3


class QuantizeOptions(CalibrationOptions):
    """How a model is quantized.

    An option that is not given is the method's to decide: 4 bits in symmetric groups of 128 (SpQR: 32), for `awq` asymmetric
    ones, for `nf4` blocks of 64, for `smoothquant` 8 bits with one scale per output row (which is what `group_size` -1 means)
    and 8-bit inputs. A transform (`awq`, `smoothquant`, `rotate`) is followed by rounding to nearest. `average_bits` gives
    layers different numbers of bits, as many on average on disk, scales included, after their sensitivity has been measured.
    `quality` is the method's preset; `options` override it. They are those of the method (`damping`, `order`, ...), of its
    weight grid (`observer`, `formula`, `scale_dtype`, `outliers`), of its inputs (`threshold`), and `level` (O1, O2, O3:
    SmoothQuant's).
    """

    method: str = Field(default="gptq", description=f"{', '.join(method_names(*FAMILIES))}.")
    bits: int | None = Field(
        default=None, description="Bits per weight, 2 to 8. Default: the method's own, for most methods 4."
    )
    average_bits: float | None = Field(
        default=None,
        gt=0,
        description="Average bits per weight on disk instead: sensitive layers get more, others fewer.",
    )
    group_size: int | None = Field(
        default=None,
        description="Weights that share a scale; -1: an output row. Default: the method's own, for most methods 128.",
    )
    symmetric: Annotated[bool | None, Flag(names=("--symmetric/--asymmetric",))] = Field(
        default=None, description="Without or with a zero point. Default: the method's own, for most methods symmetric."
    )
    quality: Literal["fast", "balanced", "best"] = Field(
        default="balanced",
        description="fast: as published; balanced: the best that the solver alone can do; best: followed by block tuning.",
    )

    def recipe(self) -> Recipe:
        """The recipe that these options stand for. Raises `UsageError` if they contradict each other."""
        if self.bits is not None and self.average_bits is not None:
            raise UsageError("--bits and --average-bits are mutually exclusive", "give one of them")
        known = find_offered(self.method, "quantize", *FAMILIES)
        preset = dict(known.preset(self.quality))
        own_size = preset.pop("group_size", None)
        chosen = {**preset, **self.options}
        level, others = split(chosen, (LEVEL,))
        of_inputs, others = split(others, INPUT_OPTIONS)
        grid, of_method = split(others, GRID_OPTIONS)
        base = _at_level(level[LEVEL]) if level else known.scheme
        size = own_size if self.group_size is None else self.group_size
        assert isinstance(base, Scheme)  # what quantizers and transforms have
        passes = self._passes(known, self._scheme(base, size, grid, of_inputs), of_method)
        recipe = self._built(passes)
        scheme = recipe.scheme
        trained = isinstance(scheme, Scheme) and find_method(TRAINED_BY).supports(scheme.weights.kind)
        return self._built([*passes, {"method": TRAINED_BY}]) if self.quality == "best" and trained else recipe

    def _built(self, passes: list[dict[str, Any]]) -> Recipe:
        allocate = None if self.average_bits is None else {"average": self.average_bits}
        return schema.build({"passes": passes, "allocate": allocate, **self.recipe_parts()}, "quantize")

    def _scheme(
        self, base: Scheme, size: int | None, grid: dict[str, Any], of_inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The scheme `base` with what was asked."""
        asked = {"bits": self.bits, "symmetric": self.symmetric}
        weights = asdict(base.weights) | {name: value for name, value in asked.items() if value is not None}
        if size is not None:
            flat = base.weights.strategy == "flat"
            weights["strategy"], weights["group_size"] = ("flat", size) if flat else group_strategy(size)
        scheme = asdict(base) | {"weights": weights | grid}
        if of_inputs:
            if base.inputs is None:
                names = ", ".join(of_inputs)
                raise UsageError(f"{self.method} does not quantize inputs, so {names} cannot be set", "use llm-int8")
            scheme["inputs"] = asdict(base.inputs) | of_inputs
        return scheme

    def _passes(self, known: Method, scheme: dict[str, Any], of_method: dict[str, Any]) -> list[dict[str, Any]]:
        """The method, and after a transform the rounding of its weights."""
        if known.compresses:
            return [{"method": known.name, "scheme": scheme} | of_method]
        return [{"method": known.name, **of_method}, {"method": AFTER_TRANSFORM, "scheme": scheme}]


def _at_level(name: str) -> Scheme:
    if name not in LEVELS:
        raise UsageError(f"level must be one of {', '.join(LEVELS)}, got {name!r}", "see docs/methods/smoothquant.md")
    return LEVELS[name]
