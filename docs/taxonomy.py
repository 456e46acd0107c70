"""The text of docs/taxonomy.md, from the tables of roles, methods, formats, runtimes and kernels in the code."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from lmpress.compress.formats.registry import format_of
from lmpress.compress.plan import LayerPlan
from lmpress.compress.runtime_support import TARGETS, faults
from lmpress.errors import UsageError
from lmpress.kernels.cache.cache import PackedCache
from lmpress.kernels.dispatch import KERNELS
from lmpress.kernels.kernel import KernelSpec
from lmpress.kernels.modules.quantized_inputs import IntegerLinear
from lmpress.recipes.methods import Family, method_names
from lmpress.recipes.schema import build
from lmpress.recipes.scheme import (
    CACHE_KEY,
    CACHED,
    INPUTS,
    STRATEGIES,
    WEIGHTS,
    QuantArgs,
    Role,
    Scheme,
    Strategy,
    kinds,
    signed_weights,
)

BITS = range(2, 9)
WIDTH, GROUP = 4096, 128  # of the example layer for formats and kernels
HEAD = """\
# The taxonomy: what is quantized, and how

`docs/generate.py` wrote this page from the tables that the code uses; a test checks that it is up to date.

A `Scheme` has three roles, `weights`, `inputs` and `kv`, each described by a `QuantArgs`: 2 to 8 bits, symmetric or asymmetric,
static or dynamic, one scale per tensor, output row (`channel`), group of neighbours (`group`) or token. Every
combination is a row below. Combinations that make no sense are refused before any work, with the reason given here. Numbers in
parentheses are the bits that a format or kernel supports, if it does not support all of them.

"""
FOOT = """
Transforms ({transforms}) can precede any of these methods, and {followers} can follow those that leave plain codes: all but
bilevel scales. Formats after the semicolon are exports, or are read directly by the runtimes of `--target`.

Weights that are not a plain grid have pages of their own:

{pages}
"""


def page() -> str:
    """The whole text of taxonomy.md."""
    foot = FOOT.format(
        transforms=_listed(method_names(Family.TRANSFORM)),
        pages="\n".join(f"- {kind.taxonomy}" for kind in kinds.all_kinds() if kind.example is None),
        followers=_listed(method_names(Family.RECONSTRUCT)),
    )
    return HEAD + "\n".join(_table(role, cell) for role, cell in ROLES) + foot


def _table(role: Role, cell: Callable[[QuantArgs], tuple[str, str, str]]) -> str:
    lines = [
        f"## {role.name.capitalize()}\n",
        "| scale per | range | grid | observers | methods | formats | served by |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for dynamic in (False, True):
        for strategy in STRATEGIES:
            lines += _rows(role, strategy, dynamic, cell)
    return "\n".join(lines) + "\n"


def _rows(
    role: Role, strategy: Strategy, dynamic: bool, cell: Callable[[QuantArgs], tuple[str, str, str]]
) -> Iterator[str]:
    place = f"| {strategy} | {'dynamic' if dynamic else 'static'} |"
    reason = role.reason(strategy, dynamic)
    if reason is not None:
        yield f"{place} | | refused: {reason} | | |"
        return
    for args in _grids(role, strategy, dynamic):
        kind = "symmetric" if args.symmetric else "asymmetric"
        kind += "" if args.kind == kinds.PLAIN else f", {kinds.kind_of(args).taxonomy}"
        yield f"{place} {kind} | {', '.join(role.observers[dynamic])} | {' | '.join(cell(args))} |"


def _grids(role: Role, strategy: Strategy, dynamic: bool) -> Iterator[QuantArgs]:
    group = GROUP if strategy == "group" else None
    for symmetric in (True, False):
        formula = next(formula for formula in role.formulas if symmetric in kinds.formulas()[formula])
        yield QuantArgs(8, symmetric, strategy, group, formula=formula, dynamic=dynamic)
    if role is WEIGHTS:
        examples = [kind.example() for kind in kinds.all_kinds() if kind.example is not None]
        yield from (args for args in examples if args.kind != kinds.PLAIN and args.strategy == strategy)


def _weights(args: QuantArgs) -> tuple[str, str, str]:
    return _listed(_methods(Scheme(args))), _weight_formats(args), _listed(_kernels(args))


def _inputs(args: QuantArgs) -> tuple[str, str, str]:
    formats = dict.fromkeys(
        group["format"]
        for each in (signed_weights("channel"), QuantArgs(bits=4))
        for group in format_of(each, args).quantization_config({"layer": each}, [])["config_groups"].values()
    )
    return _listed(_methods(Scheme(signed_weights("channel"), args))), _listed(formats), IntegerLinear.__name__


def _cached(args: QuantArgs) -> tuple[str, str, str]:
    elsewhere = "; `kv_cache_scheme` of compressed-tensors" if args.strategy == "tensor" and args.symmetric else ""
    return "`load(kv_bits=...)`, `kv` of any scheme", f"`{CACHE_KEY}` of config.json{elsewhere}", PackedCache.__name__


ROLES = ((WEIGHTS, _weights), (INPUTS, _inputs), (CACHED, _cached))


def _methods(scheme: Scheme) -> Iterator[str]:
    """The methods that accept the scheme."""
    for name in method_names(Family.QUANTIZE):
        try:
            build({"passes": [{"method": name, "scheme": asdict(scheme)}]})
        except UsageError:
            continue
        yield name


def _weight_formats(args: QuantArgs) -> str:
    storing = format_of(args)
    own = getattr(storing, "NAME") if storing.supports(args) is None else "-"  # noqa: B009 modules have it, but a Protocol cannot declare it
    others: dict[str, set[int]] = {}
    containers = [c for target, several in TARGETS.items() if target != "lmpress" for c in several]
    for container in dict.fromkeys(containers):
        for bits in BITS:
            layer = LayerPlan("layer", 0, "Linear", (WIDTH, WIDTH), _with(args, bits), 0)
            if container.format != own and not any(faults([layer], container)):
                others.setdefault(container.format, set()).add(bits)
    return own + "".join(f"; {_with_bits(name, bits)}" for name, bits in sorted(others.items()))


def _kernels(args: QuantArgs) -> Iterator[str]:
    group = args.columns_per_scale(WIDTH)
    for kernel in KERNELS:
        needs = {bits: [KernelSpec(bits, group, args.symmetric, device=d) for d in ("cpu", "cuda")] for bits in BITS}
        bits = {b for b, asked in needs.items() if any(kernel.serves.refusal(need) is None for need in asked)}
        if bits:
            yield _with_bits(kernel.name, bits)


def _with(args: QuantArgs, bits: int) -> QuantArgs:
    return QuantArgs(**{**asdict(args), "bits": bits})


def _with_bits(name: str, bits: set[int]) -> str:
    return name if bits == set(BITS) else f"{name} ({', '.join(str(b) for b in sorted(bits))})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
