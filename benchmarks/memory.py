"""Peak memory of `compress quantize` on a random Llama of about 1 GB, above the bare import of torch and transformers.

    python benchmarks/memory.py [--folder build/random-llama] [--method gptq] [--out benchmarks/results/memory.json]

The model is created on first use. The command runs in a separate process; its peak is that of the operating system
(`ru_maxrss`). The goal is a peak below 0.6 of the model's size on disk.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig

from lmpress.calibrate.model.safetensors_io import write

SAMPLE = Path(__file__).parents[1] / "examples" / "sample_model"
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=1536,
    intermediate_size=4096,
    num_hidden_layers=14,
    num_attention_heads=12,
    num_key_value_heads=12,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
# transformers imports lazily: these two names import what any program that loads a model imports.
BARE = "import torch; from transformers import AutoTokenizer, PreTrainedModel"
MEASURE = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
MEASURE += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"


def make_model(folder: Path, config: LlamaConfig) -> None:
    """Write a random model in shards of one block, with one block in memory at a time."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    shards: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        write(folder / f"model-{name}.safetensors", tensors)
        shards.update(dict.fromkeys(tensors, f"model-{name}.safetensors"))

    shard("embed", {"model.embed_tokens.weight": matrix(config.vocab_size, hidden)})
    shard("head", {"lm_head.weight": matrix(config.vocab_size, hidden)})
    shard("norm", {"model.norm.weight": torch.ones(hidden).bfloat16()})
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        block = {f"{prefix}.self_attn.{p}_proj.weight": matrix(hidden, hidden) for p in "qo"}
        block |= {f"{prefix}.self_attn.{p}_proj.weight": matrix(keys, hidden) for p in "kv"}
        block |= {f"{prefix}.mlp.{p}_proj.weight": matrix(inner, hidden) for p in ("gate", "up")}
        block[f"{prefix}.mlp.down_proj.weight"] = matrix(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[f"{prefix}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        shard(f"{index:02d}", block)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, indent=2)
    )
    AutoTokenizer.from_pretrained(SAMPLE).save_pretrained(folder)


def peak_of(*command: str) -> int:
    """Peak resident bytes of a command, run to its end in a separate process."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/random-llama"))
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", default="16", help="calibration rows of 128 tokens")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    options = parser.parse_args()
    if not options.folder.exists():
        make_model(options.folder, CONFIG)
    target = options.folder.with_name(f"{options.folder.name}-out")
    bare = peak_of(sys.executable, "-c", BARE)
    command = [sys.executable, "-m", "lmpress.cli", "quantize", str(options.folder), "-o", str(target)]
    command += ["--method", options.method, "--samples", options.samples, "--seq-len", "128", "--overwrite", "--quiet"]
    peak = peak_of(*command)
    shutil.rmtree(target)
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    record = {
        "model_bytes": size,
        "method": options.method,
        "calibration_tokens": 128 * int(options.samples),
        "bare_import_bytes": bare,
        "peak_bytes": peak,
        "above_import": peak - bare,
        "share_of_model": (peak - bare) / size,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(record, indent=2))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
