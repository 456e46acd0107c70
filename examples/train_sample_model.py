"""Train the sample model: a 7.3 M parameter Llama that writes Python, small enough to be in the repository.

With it the tests and the documentation can compress a trained model without a download. It is trained on the built-in
corpus `python-stdlib` and on a bounded amount of other Python source on this machine, and evaluated by its perplexity on the
corpus's held-out files, compared with a unigram and a Kneser-Ney 5-gram model of the same training tokens.

    python examples/train_sample_model.py --minutes 30 --checkpoint /tmp/sample.pt

The learning rate follows the budget (`--tokens`, or `--minutes` if that ends first). An interrupted run continues
with `--resume`; a smaller `--minutes` then makes it decay, finish and export early.
"""

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmpress.calibrate.data.builtin_corpus import documents
from ngrams import VOCABULARY, KneserNey, unigram_losses
from python_text import extra_documents, is_unlike, long_lines

MODEL_CARD = Path(__file__).with_name("sample_model_card.md")

CONTEXT = 512
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1

MUON_LR, ADAMW_LR = 0.02, 0.003
WARMUP, DECAY = 0.02, 0.3  # fractions of the budget
CLIP_NORM = 1.0
EVAL_ROWS = 32
NGRAM_ORDER = 5


# --- tokens -----------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `BOS` before every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one run of token ids, each text after a BOS, cut to whole rows of `CONTEXT`."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    ids = torch.tensor([token for ids in encoded for token in ids])
    return ids[: len(ids) // CONTEXT * CONTEXT]


@dataclass(frozen=True)
class Data:
    """Token streams: `stdlib` is the part of `training` that comes from the built-in corpus.

    `distinct` marks the held-out tokens of files that share few long lines with the training text: the splits are made
    by file, so generated files (the tables of `encodings/`) have siblings on both sides.
    """

    stdlib: Tensor
    training: Tensor
    heldout: Tensor
    distinct: Tensor


def load_data(tokenizer: PreTrainedTokenizerFast, texts: list[str], extra_ratio: float, seed: int) -> Data:
    """Tokens of `texts`, of `extra_ratio` times as much other text, and of the held-out files."""
    extra = extra_documents(int(extra_ratio * sum(map(len, texts))), seed)
    stdlib = stream(tokenizer, texts)
    seen = long_lines(texts + extra)
    heldout = stream(tokenizer, documents("heldout"))
    file_of_token = (heldout == BOS_ID).cumsum(0) - 1
    return Data(
        stdlib=stdlib,
        training=torch.cat([stdlib, stream(tokenizer, extra)]),
        heldout=heldout,
        distinct=torch.tensor([is_unlike(text, seen) for text in documents("heldout")])[file_of_token],
    )


def batch(rows: Tensor, step: int, size: int, seed: int) -> Tensor:
    """Rows of training step `step`: every epoch is a new permutation of `rows`, so the order needs no state."""
    count = len(rows) // size
    epoch, place = divmod(step, count)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch))
    return rows[order[place * size : (place + 1) * size]]


# --- model and training -----------------------------------------------------------------------------------------------


def new_model() -> LlamaForCausalLM:
    """The untrained model; its blocks start as the identity, with which small models learn faster."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.1),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(progress: float) -> float:
    """Learning rate factor at `progress` (0..1 of the budget): short warm-up, constant, linear decay to zero."""
    return max(0.0, min((progress + 1e-3) / WARMUP, 1.0, (1 - progress) / DECAY))


def token_losses(forward: Callable[..., Any], rows: Tensor, bf16: bool) -> Tensor:
    """Negative log-likelihood, in nats, of every token of every row but the first: `[rows, length - 1]`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = forward(input_ids=rows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), rows[:, 1:], reduction="none")


@torch.inference_mode()
def heldout_losses(model: LlamaForCausalLM, rows: Tensor, bf16: bool) -> Tensor:
    """`token_losses` of many rows, without gradients."""
    return torch.cat([token_losses(model, part, bf16) for part in rows.split(8)])


@dataclass
class Run:
    """The state of a training run, which a checkpoint holds."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]


def train(run: Run, data: Data, args: argparse.Namespace) -> None:
    """Train until the token or the time budget is spent; logs and writes a checkpoint every `--every` steps."""
    forward = torch.compile(run.model) if args.compile else run.model
    rows = data.training.view(-1, CONTEXT)
    heldout = data.heldout.view(-1, CONTEXT)
    subset = heldout[:: max(1, len(heldout) // EVAL_ROWS)]
    started = time.monotonic() - run.seconds
    recent: list[float] = []
    while (progress := budget_spent(run, args)) < 1:
        factor = schedule(progress)
        recent.append(update(run, forward, batch(rows, run.step, args.batch, args.seed), factor, args.bf16))
        run.step += 1
        run.seconds = time.monotonic() - started
        if run.step % args.every == 0:
            heldout_loss = heldout_losses(run.model, subset, args.bf16).mean().item()
            record(run, sum(recent) / len(recent), heldout_loss, factor, args)
            recent.clear()
    run.save(args.checkpoint)


def budget_spent(run: Run, args: argparse.Namespace) -> float:
    """The part of the token or of the time budget that is used up, whichever is larger."""
    return max(run.step * args.batch * CONTEXT / args.tokens, run.seconds / (60 * args.minutes))


def update(run: Run, forward: Callable[..., Any], rows: Tensor, factor: float, bf16: bool) -> float:
    """One optimiser step at `factor` times the full learning rates; returns the loss before it."""
    loss = token_losses(forward, rows, bf16).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP_NORM)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def record(run: Run, loss: float, heldout_loss: float, factor: float, args: argparse.Namespace) -> None:
    run.log.append(
        {
            "step": run.step,
            "tokens": run.step * args.batch * CONTEXT,
            "seconds": round(run.seconds, 1),
            "lr_factor": round(factor, 4),
            "train_loss": round(loss, 4),
            "heldout_loss": round(heldout_loss, 4),
        }
    )
    print(json.dumps(run.log[-1]), flush=True)
    run.save(args.checkpoint)


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(model: LlamaForCausalLM, data: Data) -> dict[str, float]:
    """Held-out perplexity of the model and of the n-gram models, all on the same tokens.

    All tokens but the first of each row are evaluated. The n-gram models also read the tokens before a row, while the model
    reads only the row. The 5-gram model is also given without the extra text, which is farther from the held-out files.
    """
    training, heldout = data.training.numpy(), data.heldout.numpy()
    losses = {
        "unigram": unigram_losses(training, heldout),
        "fivegram": KneserNey(training, NGRAM_ORDER).losses(heldout),
        "fivegram_stdlib": KneserNey(data.stdlib.numpy(), NGRAM_ORDER).losses(heldout),
    }
    by_row = {name: loss.reshape(-1, CONTEXT)[:, 1:] for name, loss in losses.items()}
    by_row["model"] = heldout_losses(model, data.heldout.view(-1, CONTEXT), bf16=False).numpy()
    distinct = data.distinct.view(-1, CONTEXT)[:, 1:].numpy()
    return {
        **{f"{name}_perplexity": perplexity(loss) for name, loss in by_row.items()},
        **{f"{name}_perplexity_distinct": perplexity(loss[distinct]) for name, loss in by_row.items()},
    }


def perplexity(losses: np.ndarray) -> float:
    return round(float(np.exp(losses.mean())), 3)


# --- results ----------------------------------------------------------------------------------------------------------


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> LlamaForCausalLM:
    """Write model and tokenizer to `out`; returns the model as stored, rounded to bf16, for evaluation in fp32."""
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def plot(log: list[dict[str, float]], result: dict[str, Any], path: Path) -> None:
    """Losses over tokens, with the baselines as horizontal lines."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    tokens = [entry["tokens"] / 1e6 for entry in log]
    axes.plot(tokens, [entry["train_loss"] for entry in log], label="training", linewidth=1)
    axes.plot(tokens, [entry["heldout_loss"] for entry in log], label="held out (subset)")
    for name, label, style in (("unigram", "unigram", ":"), ("fivegram", "Kneser-Ney 5-gram", "--")):
        loss = math.log(result[f"{name}_perplexity"])
        axes.axhline(loss, linestyle=style, color="gray", label=f"{label}, held out")
    axes.set(xlabel="million tokens", ylabel="nats per token", title="Sample model: loss during training")
    axes.legend()
    figure.savefig(path, dpi=110)


def write_results(run: Run, result: dict[str, Any], out: Path) -> None:
    lines = [*run.log, result]
    (out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "README.md").write_text(MODEL_CARD.read_text().format(**result))
    plot(run.log, result, out / "training.png")


def results(run: Run, stored: LlamaForCausalLM, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of the model card."""
    distinct = data.distinct.view(-1, CONTEXT)[:, 1:]
    return {
        "parameters": stored.num_parameters(),
        "tokens_trained": run.step * args.batch * CONTEXT,
        "training_tokens": len(data.training),
        "stdlib_share": round(len(data.stdlib) / len(data.training), 3),
        "minutes": round(run.seconds / 60, 1),
        "threads": args.threads,
        "python": sysconfig.get_python_version(),
        "heldout_tokens": distinct.numel(),
        "heldout_tokens_distinct": int(distinct.sum()),
        **evaluate(stored, data),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample_model", help="folder to write")
    parser.add_argument("--checkpoint", type=Path, required=True, help="file for resumable checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--tokens", type=float, default=20e6, help="token budget")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time budget of the training")
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens per step")
    parser.add_argument("--extra-ratio", type=float, default=1.0, help="other text, relative to the standard library's")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 matrix products")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts = documents("training")
    tokenizer = train_tokenizer(texts)
    data = load_data(tokenizer, texts, args.extra_ratio, args.seed)
    print(f"{len(data.training):,} training tokens, {len(data.stdlib):,} of them standard library", flush=True)
    model = new_model()
    run = Run(model, new_optimizers(model))
    if args.resume:
        run.restore(args.checkpoint)
    train(run, data, args)
    stored = export(model, tokenizer, args.out)
    write_results(run, results(run, stored, data, args), args.out)


if __name__ == "__main__":
    main()
