"""What tests share: the trained models and texts outside the repository, and a tiny random model made on the spot."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads this when it is imported, and transformers imports it: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lmpress.calibrate.model.architecture import find_blocks
from lmpress.calibrate.runner import Call

LETTERS = "abcdefgh"

torch.set_num_threads(1)  # the models are tiny: several threads only wait for each other

BASE: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GQA),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", GQA),
    "mistral": ("mistral", GQA),
    "smollm3": ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0]}),
    "seed_oss": ("seed_oss", GQA),
    "gemma2": ("gemma2", GQA),
    "gemma3": ("gemma3_text", GQA),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "phi": ("phi", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}),
    "mixtral": ("mixtral", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture
def assets(request: pytest.FixtureRequest) -> Path:
    """The folder with `models/` and `data/`; tests that need it are skipped if it is absent."""
    folder = Path(os.environ.get("COMPRESS_ASSETS") or request.config.rootpath.parent / "shared").resolve()
    if not (folder / "models").is_dir() or not (folder / "data").is_dir():
        pytest.skip(
            f"{request.node.name} needs trained models and texts, and {folder} has no models/ and data/: "
            "set COMPRESS_ASSETS to a folder that has them"
        )
    return folder


@pytest.fixture
def device() -> str:
    """The device for the Triton kernels: a GPU if there is one, otherwise the CPU with Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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


def random_model(name: str, **changes: Any) -> PreTrainedModel:
    """A random float32 model of an architecture; norms and biases too, so that nothing holds by the accident of a default."""
    kind, shape = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **(BASE | shape | changes)), dtype=torch.float32
        )
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                gain = parameter_name.endswith("weight") and not kind.startswith("gemma")
                nn.init.normal_(parameter, float(gain), 0.2)
    return model.eval()


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Gives the random model of an architecture by its name in `ARCHITECTURES`, and what its config changes."""
    return random_model


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    """Every architecture in turn: its name and its random model."""
    return request.param, random_model(request.param)


@pytest.fixture
def random_ids() -> Tensor:
    """Sixteen rows of five tokens that are in the vocabulary of every random model."""
    return torch.randint(3, BASE["vocab_size"], (16, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def record(random_ids: Tensor) -> Callable[[PreTrainedModel, int], tuple[nn.Module, Call, Tensor]]:
    """Gives block `index` of a model, how the model calls it on `random_ids`, and the hidden states of that call."""

    def run(model: PreTrainedModel, index: int) -> tuple[nn.Module, Call, Tensor]:
        seen: list[tuple[Call, Tensor]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            seen.append((Call(args[1:], rest), hidden))

        block = find_blocks(model)[1][index]
        handle = block.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(random_ids, use_cache=False)
        handle.remove()
        return block, *seen[0]

    return run
