"""Write the tables that come from benchmarks/results/*.json into the pages: `<!-- table NAME -->` ... `<!-- /table -->`.

    python docs/measurements.py

The text around the tables is written by hand.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measurements.md", ROOT / "docs" / "serving.md")
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
PRODUCTS = "bench-amd-epyc-family-26-model-2-1t"
NAMES = {"rtn": "rounded", "gptq": "GPTQ", "sample_model": "original, bfloat16"}


def filled(page: str) -> str:
    """The text of a page with every marked table written again. Raises KeyError if a marker names no table."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def demo() -> str:
    """What `make demo` printed, without the seconds, which depend on what else the machine was doing."""
    titles = ("checkpoint", "weights", "bits per weight", "perplexity", "KL to the original", "same next token")
    rows = [[_checkpoint(row[0]), *row[1:6], *[""] * (6 - len(row))] for row in _read("demo")["rows"]]
    return _table(titles, rows)


def _checkpoint(name: str) -> str:
    found = re.fullmatch(r"sample-(\w+)-w(\d)", name)
    return f"{NAMES[found[1]]}, {found[2]} bits" if found else NAMES[name]


def methods() -> str:
    """Every method on two models."""
    rows = {(row["model"], row["command"]): row for row in _read("methods")}
    titles = ["`compress`"]
    for model in ("stories260K", "sample model"):
        titles += [f"{model}: perplexity", "KL", "bits per weight", "size", "seconds"]
    commands = dict.fromkeys(command for _, command in rows)
    models = dict.fromkeys(model for model, _ in rows)
    return _table(
        titles, ([f"`{command}`", *(c for m in models for c in _method(rows[m, command]))] for command in commands)
    )


def _method(row: Mapping[str, Any]) -> tuple[str, ...]:
    figures = (f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['bits']:.2f}", f"{row['share']:.0%}")
    return (*figures, f"{row['seconds']:.0f}")


def quality() -> str:
    """KL as a share of rounding's, by model, grid and quality."""
    found = _read("quality")
    ratios = {(r["model"], r["grid"], r["method"], r["quality"]): f"{r['ratio']:.3f}" for r in found}
    bits = {(r["model"], r["grid"]): r["bits"] for r in found if r["method"] == "rtn"}
    rounding = {(r["model"], r["grid"]): r["kl"] for r in found if r["method"] == "rtn"}
    columns = [("gptq", "fast"), ("gptq", "balanced"), ("gptq", "best"), ("spqr", "balanced"), ("spqr", "best")]
    titles = ["model", "grid", "bits per weight", "KL of rounding", *(f"{m} `{q}`" for m, q in columns)]
    return _table(
        titles,
        (
            [*key, f"{bits[key]:.2f}", f"{rounding[key]:.4f}", *(ratios.get((*key, *c), "") for c in columns)]
            for key in bits
        ),
    )


def autoround() -> str:
    """Block tuning and AutoRound on the same grids."""
    titles = ("model", "grid", "method", "KL", "share of rounding's", "CPU seconds")
    return _table(
        titles,
        (
            [r["model"], r["grid"], r["method"], f"{r['kl']:.5f}", f"{r['ratio']:.3f}", f"{r['seconds']:.1f}"]
            for r in _read("autoround")
        ),
    )


def llamacpp() -> str:
    """GPTQ and llama.cpp's quantizer on the same blocks."""
    found = _read("llamacpp")
    base = {row["block"]: row for row in found if row["method"] == "llama.cpp"}
    titles = ("block", "quantized by", "KL", "standard error", "share of llama.cpp's", "bytes")
    return _table(
        titles,
        (
            [r["block"], r["method"], f"{r['kl']:.5f}", f"{r['error']:.5f}", *_against(r, base[r["block"]])]
            for r in found
        ),
    )


def _against(row: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['kl'] / base['kl']:.2f}", f"{row['nbytes']:,}"


def export() -> str:
    """Time and memory of `compress export`."""
    titles = ("format", "bytes read", "bytes written", "seconds", "seconds over those of a copy", "MB above the import")
    return _table(
        titles,
        (
            [
                f"`{r['format']}`",
                f"{r['checkpoint_bytes']:,}",
                f"{r['export_bytes']:,}",
                f"{r['seconds']:.1f}",
                f"{r['ratio']:.1f}",
                f"{r['above_import_bytes'] / 1e6:.0f}",
            ]
            for r in _read("export")["exports"]
        ),
    )


def quantize_costs() -> str:
    """Memory, solver time and start-up."""
    memory, solver, start = _read("memory"), _read("solver"), _read("startup")
    size, share = memory["model_bytes"] / 1e6, memory["share_of_model"]
    return _table(
        ("what", "figure", "command"),
        [
            (
                f"memory of `compress quantize` above importing torch, as a share of a model of {size:.0f} MB",
                f"{share:.2f}",
                "`benchmarks/memory.py`",
            ),
            (
                "seconds of GPTQ's solver as a share of the textbook's, 4096 x 4096, one thread",
                f"{solver['ratio']:.2f}",
                "`benchmarks/solver.py`",
            ),
            (
                "seconds of the solver: `balanced` over `fast`",
                f"{solver['balanced_over_fast']:.1f}",
                "`benchmarks/solver.py`",
            ),
            (
                "the same for a whole layer, Hessian included",
                f"{solver['balanced_over_fast_layer']:.1f}",
                "`benchmarks/solver.py`",
            ),
            ("seconds until `--help` is printed", f"{start['help']['wall']:.1f}", "`benchmarks/startup.py`"),
        ],
    )


def whole_models() -> str:
    """Tokens per second and memory of whole models, llama.cpp's last."""
    rows = []
    for found in _read("whole-models"):
        every = [*found["ours"], {"name": "llama.cpp, Q4_0", **found["llama.cpp"]}]
        for each in every:
            rates = (f"{each['prefill']:,.0f}", f"{each['decode']:,.1f}", f"{each['peak_bytes'] / 1e6:,.0f}")
            rows.append((found["model"], each["name"], str(found["threads"]), *rates))
    titles = ("model", "checkpoint", "threads", "prefill, tokens/s", "decode, tokens/s", "peak memory, MB")
    return _table(titles, rows)


def verdicts() -> str:
    """Trained models, rounded and pruned from harmless to ruined."""
    titles = ("model", "result", "KL", "same next token", "perplexity, times the original's", "verdict")
    return _table(
        titles,
        (
            [
                r["model"],
                r["run"],
                f"{r['kl']:.4f}",
                f"{r['top1_agreement']:.1%}",
                f"{r['perplexity'] / r['perplexity_base']:.3g}",
                r["verdict"],
            ]
            for r in _read("verdicts")["rows"]
        ),
    )


def products() -> str:
    """How many times as fast as float32 in torch each product is, by shape and number of input rows."""
    timings = _read(PRODUCTS)["timings"]
    kinds = list(dict.fromkeys((t["rows"], t["columns"], t["inputs"]) for t in timings))
    ratios = {(t["name"], t["rows"], t["columns"], t["inputs"]): t["ratio"] for t in timings}
    names = dict.fromkeys(t["name"] for t in timings)
    titles = ["product", *(f"{rows} x {columns}: {inputs}" for rows, columns, inputs in kinds)]
    return _table(titles, ([name, *(f"{ratios[name, *kind]:.1f}" for kind in kinds)] for name in names))


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "methods": methods,
    "quality": quality,
    "autoround": autoround,
    "llamacpp": llamacpp,
    "export": export,
    "quantize-costs": quantize_costs,
    "whole-models": whole_models,
    "products": products,
    "verdicts": verdicts,
}


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(titles)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main() -> None:
    """Write every page that has tables again."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
