"""The options of `prune`, and the recipe that they stand for."""

from pydantic import Field

from ...errors import UsageError
from .. import schema
from ..methods import Family, method_names
from ..schema import Recipe
from ..scheme.prune_args import Storage
from .calibration import CalibrationOptions, split
from .offered import find_offered

SCHEME_OPTIONS = ("scope", "dtype")


class PruneOptions(CalibrationOptions):
    """How a model is pruned.

    `sparsity` is the share of the weights that becomes zero (0.5 if neither it nor a pattern is given), a `pattern` such as
    `2:4` the number of zeros in every group of columns, `1x4` the columns that become zero together (ExactOBS). With
    `allocate` the sparsity is the average over all layers: layers that tolerate less get less, which is measured first.
    `options` are those of the method (`damping`, `refit`, ...), of the choice of weights (`scope`) and of the stored values
    (`dtype`).
    """

    method: str = Field(default="exactobs", description=f"{', '.join(method_names(Family.PRUNE))}.")
    sparsity: float | None = Field(default=None, description="Share of the weights that becomes zero. Default: 0.5")
    pattern: str | None = Field(
        default=None, description="Zeros in every group of columns instead: 2:4, 4:8; or blocks of columns: 1x4."
    )
    allocate: bool = Field(
        default=False, description="Give each layer the sparsity that it tolerates, at the same average."
    )
    format: Storage = Field(
        default="dense",
        description="dense: loads everywhere, not smaller; bitmask or 2:4: smaller, loads with lmpress.load.",
    )

    def recipe(self) -> Recipe:
        """The recipe that these options stand for. Raises `UsageError` if they contradict each other."""
        if self.sparsity is not None and self.pattern is not None and ":" in self.pattern:
            raise UsageError("a pattern such as 2:4 fixes the sparsity", "give --sparsity or --pattern, not both")
        find_offered(self.method, "prune", Family.PRUNE)
        of_scheme, of_method = split(self.options, SCHEME_OPTIONS)
        sparsity = 0.5 if self.sparsity is None else self.sparsity
        weights = {"sparsity": sparsity, "pattern": self.pattern, "storage": self.format, **of_scheme}
        return schema.build(
            {
                "passes": [{"method": self.method, "scheme": {"weights": weights}, **of_method}],
                "allocate": {} if self.allocate else None,
                **self.recipe_parts(),
            },
            "prune",
        )
