"""The perplexity of models with fewer layers and narrower blocks, before and after training, and of a chain that combines them.

    python benchmarks/reduction.py MODEL [--data python-stdlib] [--steps 500] [--chain smaller-w4] [--out FILE]

Measured without training and on the same rows: every `--choice` of layers with `--drop` of them removed, the MLP at
`--mlp-width`, the residual stream at `--hidden-size`, each with and without the refit, and half of the key-value heads. With
`--steps` the greedy choice is trained as well. With `--chain` that chain is run, its export last, and compared with the whole
model quantized to as few bytes, with the chain's embedding: the most accurate recipe with 2 bits, and with 3.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lmpress
from lmpress import distill, evaluate
from lmpress.calibrate.data.token_rows import calibration_rows
from lmpress.compress.formats.tokenizer import load_tokenizer
from lmpress.compress.output.record import WEIGHTS
from lmpress.compress.structured.hidden_size import prune_hidden_size
from lmpress.compress.structured.layer_selection import SELECTIONS
from lmpress.compress.structured.width import Width, prune_width
from lmpress.eval.perplexity import Evaluation
from lmpress.recipes import chain, schema
from lmpress.recipes.schema import PassSpec


def rows_of(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """The name and the folder of each reduced model."""
    common = {"data": options.data, "samples": options.samples, "seq_len": options.length}
    if options.chain:
        yield from same_size(options, folder)
    if options.chain_only:
        return
    for choice in SELECTIONS:
        out = folder / choice
        made = distill(options.model, out, drop=options.drop, choice=choice, options={"steps": 0}, **common)
        yield f"layers {', '.join(map(str, made.kept))} ({choice})", out
    rows = calibration_rows(options.data, load_tokenizer(options.model), options.samples, options.length)
    heads = AutoConfig.from_pretrained(options.model).num_key_value_heads
    mlp = Width(mlp=options.mlp_width)
    widths = {
        f"MLP at {options.mlp_width:g}, refitted": mlp,
        f"MLP at {options.mlp_width:g}, only removed": replace(mlp, refit=False),
        f"{max(1, heads // 2)} of {heads} key-value heads, refitted": Width(kv_heads=max(1, heads // 2)),
    }
    for number, (name, width) in enumerate(widths.items()):
        prune_width(options.model, folder / f"width-{number}", width, rows)
        yield name, folder / f"width-{number}"
    for refit in (True, False):
        out = folder / f"hidden-{refit}"
        prune_hidden_size(options.model, out, options.hidden_size, rows, refit=refit)
        yield f"residual stream at {options.hidden_size:g}, {'refitted' if refit else 'only removed'}", out
    if options.steps:
        out, common["samples"] = folder / "trained", options.training_rows
        distill(options.model, out, drop=options.drop, choice="greedy", options={"steps": options.steps}, **common)
        yield f"greedy, then {options.steps} steps of distillation", out


def same_size(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """The chain's checkpoint, its export, and the whole model in as few bytes."""
    wanted = chain.read(options.chain)
    assert isinstance(wanted, chain.Chain)
    *stages, last = wanted.stages
    packed = next(stage for stage in stages if isinstance(stage, schema.Recipe))
    lmpress.run(options.model, folder / "chain", chain.Chain(tuple(stages)))
    yield f"chain {options.chain}", folder / "chain"
    if isinstance(last, chain.Export) and last.format == "gguf":
        lmpress.export(folder / "chain", folder / "exported", format=last.format)
        yield f"chain {options.chain}, as {last.format}", folder / "exported"
    best = schema.read("best-w2")
    weights = replace(best.scheme.weights, bits=3, group_size=64)
    three = best.passes[0].config
    three = PassSpec(method="gptq", config=replace(three, scheme=replace(three.scheme, weights=weights)))
    for bits, passes in ((2, best.passes), (3, (three, *best.passes[1:]))):
        plain = best.model_copy(update={"embedding": packed.embedding, "passes": passes})
        lmpress.run(options.model, folder / f"plain-{bits}", plain)
        yield f"whole model, best at {bits} bits", folder / f"plain-{bits}"


def evaluated(out: Path, options: argparse.Namespace) -> Evaluation:
    """The evaluation of a checkpoint or of a GGUF file, which transformers reads."""
    file = out / "model.gguf"
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name) if file.exists() else out
    return evaluate(model, options.data, seq_len=options.length, rows=options.rows, against=options.model)


def size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="python-stdlib")
    parser.add_argument("--drop", type=float, default=0.25)
    parser.add_argument("--mlp-width", type=float, default=0.67)
    parser.add_argument("--hidden-size", type=float, default=0.75)
    parser.add_argument("--chain", help="a chain, such as smaller-w4")
    parser.add_argument(
        "--chain-only", action="store_true", help="measure only the chain and the whole model in as few bytes"
    )
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--training-rows", type=int, default=4096, help="rows that the training uses")
    parser.add_argument("--samples", type=int, default=64, help="calibration rows")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=24, help="held-out rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reduction.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| model | share of the bytes | perplexity | KL to the whole | CPU seconds |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        for name, out in rows_of(options, Path(folder)):
            seconds = time.process_time() - started
            found = evaluated(out, options)
            if len(lines) == 2:
                lines.append(f"| whole | 1 | {found.perplexity_base:.2f} | 0 | |")
            share = size(out) / size(Path(options.model))
            lines.append(f"| {name} | {share:.3f} | {found.perplexity:.2f} | {found.kl:.4f} | {seconds:.1f} |")
            print(lines[-1], flush=True)
            started = time.process_time()
    title = (
        f"# Fewer layers and channels: {Path(options.model).name}\n\n{options.rows} x {options.length} held-out tokens of "
        f"{Path(options.data).name}, calibration {options.samples} x {options.length}; torch {torch.__version__}, 1 thread.\n"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join([title, *lines]) + "\n")


if __name__ == "__main__":
    main()
