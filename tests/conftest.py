"""What tests share: the trained models and texts outside the repository, and a tiny random model made on the spot."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefgh"

torch.set_num_threads(1)  # the models are tiny: several threads only wait for each other


@pytest.fixture
def assets(request: pytest.FixtureRequest) -> Path:
    """The folder with `models/` and `data/`; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("COMPRESS_ASSETS") or request.config.rootpath.parent / "shared").resolve()
    if not (folder / "models").is_dir() or not (folder / "data").is_dir():
        pytest.skip(
            f"{request.node.name} needs trained models and texts, and {folder} has no models/ and data/: "
            "set COMPRESS_ASSETS to a folder that has them"
        )
    return folder


def letters_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per letter a..h (ids 2..9), `<unk>` = 0 and, with `bos`, `<s>` = 1."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>" if bos else None)


def tiny_llama(seed: int = 0, vocabulary: int = 10) -> LlamaForCausalLM:
    """A random Llama of two layers and context 32; its weights are large enough for predictions that differ."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    return letters_tokenizer()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with the tiny model and its tokenizer."""
    folder = tmp_path / "tiny"
    tiny_llama().save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    return folder
