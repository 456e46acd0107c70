"""Write the pages that follow from the code: the taxonomy, and the lists of methods in index.md and README.md.

python docs/generate.py
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import taxonomy
from lmpress.recipes.methods import METHODS, Family, method_names
from lmpress.recipes.schema import shipped

DOCS = Path(__file__).resolve().parent
BEGIN, END = "<!-- methods -->", "<!-- /methods -->"
WORDS = {
    Family.QUANTIZE: "Quantizers",
    Family.TRANSFORM: "Transforms before a quantizer",
    Family.RECONSTRUCT: "Passes after a quantizer",
    Family.PRUNE: "Pruning",
}


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """What every generated page must contain, by its path. Raises `ValueError` if a page lacks its markers."""
    index, readme = DOCS / "index.md", DOCS.parent / "README.md"
    return {
        DOCS / "taxonomy.md": taxonomy.page(),
        index: with_section(index.read_text(encoding="utf-8"), listed()),
        readme: with_section(readme.read_text(encoding="utf-8"), table(recipes_by_method())),
    }


def with_section(page: str, section: str) -> str:
    """The page with `section` between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section}{END}{after}"


def listed() -> str:
    """The methods of every family, each with its purpose, for a page in this folder."""
    parts = []
    for family in Family:
        lines = [f"- [`{name}`](methods/{name}.md): {METHODS[name].purpose}" for name in method_names(family)]
        parts.append("\n".join([f"{WORDS[family]}:", "", *lines, ""]))
    return "\n".join(["", *parts, ""])


def table(recipes: Mapping[str, list[str]]) -> str:
    """All methods in one table, for a page in the folder above: `recipes` are the shipped ones to be named for each."""
    lines = ["| method | family | what it does | recipe |", "|---|---|---|---|"]
    for family in Family:
        for name in method_names(family):
            used = ", ".join(f"`{recipe}`" for recipe in recipes.get(name, []))
            lines.append(f"| [`{name}`](docs/methods/{name}.md) | {family} | {METHODS[name].purpose} | {used} |")
    return "\n".join(lines) + "\n"


def recipes_by_method() -> dict[str, list[str]]:
    """The simplest shipped recipes of every method: those with the fewest passes, and of these the shortest names."""
    using: dict[str, list[tuple[tuple[int, int], str]]] = {}
    for recipe, text in shipped().items():
        for passes in passes_of(yaml.safe_load(text)):
            for entry in passes:
                using.setdefault(entry["method"], []).append(((len(passes), len(recipe)), recipe))
    return {name: [recipe for rank, recipe in found if rank == min(found)[0]] for name, found in using.items()}


def passes_of(recipe: Mapping[str, Any]) -> Iterator[list[Mapping[str, Any]]]:
    """The passes of a recipe; of a chain, those of every stage that compresses."""
    stages = [stage.get("compress", {}) for stage in recipe.get("stages", [])]
    yield from (each["passes"] for each in (recipe, *stages) if "passes" in each)


if __name__ == "__main__":
    main()
