"""What the harnesses attack: tiny models, every kind of checkpoint that lmpress writes of them, texts and recipes.

All of it is made by the public interface alone, with fixed seeds.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lmpress

LETTERS = "abcdefgh"
TEXT = "abcdefghhgfedcbaacegbdfh" * 60
LENGTHS = {"hidden_size": 64, "intermediate_size": 128}  # what every export can hold
WEIGHTS = {"bits": 4, "symmetric": True, "strategy": "group", "group_size": 8}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {
        "passes": [{"method": "gptq", "scheme": {"weights": WEIGHTS}, "damping": 0.01}],
        "calibration": {"data": "text.txt", "samples": 4, "seq_len": 16},
    },
    "chain": {
        "stages": [
            {
                "distill": {
                    "drop": 0.5,
                    "choice": "spread",
                    "data": "text.txt",
                    "samples": 16,
                    "seq_len": 16,
                    "steps": 2,
                }
            },
            {"compress": {"passes": [{"method": "rtn", "scheme": {"weights": WEIGHTS}}]}},
            {"export": {"format": "fp16"}},
        ]
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter a..h, `<unk>` = 0 and `<s>` = 1."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def save_model(folder: Path, shard: str = "1GB", **changes: int) -> Path:
    """A random Llama of two layers and context 32 with its tokenizer, in shards of at most the size `shard`."""
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24} | changes
    config = LlamaConfig(
        vocab_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=1,
        **shape,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def save_texts(folder: Path) -> None:
    """The same text as plain lines, as JSON lines and as a Parquet table."""
    documents = [TEXT[start : start + 96] for start in range(0, len(TEXT), 96)]
    (folder / "text.txt").write_text(TEXT)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    pq.write_table(pa.table({"text": documents}), folder / "text.parquet")


def save_recipes(folder: Path) -> None:
    """Every recipe as YAML; it reads text.txt in the current folder, so that its bytes are the same everywhere."""
    for name, content in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def make_samples(folder: Path) -> None:
    """Write everything that is attacked into `folder`: models and checkpoints as folders, texts and recipes as files."""
    folder.mkdir(parents=True)
    save_texts(folder)
    save_recipes(folder)
    save_model(folder / "dense")
    save_model(folder / "sharded", shard="5KB")
    model, calibration = save_model(folder / "wide", **LENGTHS), {"samples": 4, "seq_len": 16}
    text = str(folder / "text.txt")
    lmpress.quantize(model, folder / "packed", method="rtn", group_size=32)
    lmpress.quantize(model, folder / "asymmetric", method="rtn", group_size=32, symmetric=False)
    lmpress.quantize(model, folder / "nf4", method="nf4")
    lmpress.quantize(model, folder / "int8", method="smoothquant", calib=text, **calibration)
    lmpress.quantize(model, folder / "spqr", method="spqr", calib=text, **calibration)
    lmpress.quantize(model, folder / "llm-int8", method="llm-int8", calib=text, **calibration)
    lmpress.prune(model, folder / "2-4", method="magnitude", pattern="2:4", format="2:4")
    lmpress.prune(model, folder / "bitmask", method="magnitude", sparsity=0.5, format="bitmask")
    lmpress.export(folder / "packed", folder / "gptq", format="gptq")
    lmpress.export(folder / "asymmetric", folder / "awq", format="awq")
    lmpress.export(folder / "nf4", folder / "bitsandbytes", format="bitsandbytes")
    lmpress.export(folder / "packed", folder / "gguf", format="gguf")
