"""The tokenizer in GGUF's metadata, from `tokenizer.json`: byte-level BPE and sentencepiece-style BPE."""

import json
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # the token types of llama.cpp
NO_VOCABULARY = "no_vocab"


def add_tokenizer(writer: Any, folder: Path, config: Any) -> list[str]:
    """Add the tokenizer of `folder` to `writer`; returns what could not be written. `config` has ids of special tokens."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"model": {"type": None}}
    if described["model"]["type"] != "BPE":
        writer.add_tokenizer_model(NO_VOCABULARY)
        kind = described["model"]["type"]
        return [
            f"no tokenizer in the file: {f'its type {kind} has none in GGUF' if kind else 'the checkpoint has none'}"
        ]
    notes = _add_byte_level(writer, described) if _is_byte_level(described) else _add_sentencepiece(writer, described)
    _add_vocabulary(writer, described, config.vocab_size)
    _add_special(writer, described, config)
    template = _chat_template(folder)
    if template:
        writer.add_chat_template(template)
    return notes


def _is_byte_level(described: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(described["pre_tokenizer"], "pretokenizers"))


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be one step or a sequence."""
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _add_byte_level(writer: Any, described: dict[str, Any]) -> list[str]:
    writer.add_tokenizer_model("gpt2")
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    known = len(steps) == 1 and steps[0].get("use_regex", True)
    writer.add_tokenizer_pre("gpt-2" if known else "default")
    return [] if known else ["llama.cpp may split text into words otherwise: the pre-tokenizer has no GGUF name here"]


def _add_sentencepiece(writer: Any, described: dict[str, Any]) -> list[str]:
    """Merges become scores: the earlier a merge, the higher the score of what it makes."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    merges = described["model"]["merges"]
    parts = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    scores: dict[str, float] = {}
    for rank, pair in enumerate(parts):
        scores.setdefault("".join(pair), -float(rank))
    writer.add_token_scores([scores.get(token, 0.0) for token in _tokens(described)])
    steps = _steps(described["normalizer"], "normalizers")
    writer.add_add_space_prefix(any(step["type"] == "Prepend" for step in steps))
    collapsing = any(step["type"] == "Replace" and step["pattern"] == {"Regex": " +"} for step in steps)
    writer.add_remove_extra_whitespaces(collapsing)
    return []


def _tokens(described: dict[str, Any]) -> list[str]:
    ids = dict(described["model"]["vocab"]) | {t["content"]: t["id"] for t in described["added_tokens"]}
    return sorted(ids, key=lambda token: ids[token])


def _add_vocabulary(writer: Any, described: dict[str, Any], size: int) -> None:
    tokens = _tokens(described)
    added = {t["content"]: CONTROL if t["special"] else USER_DEFINED for t in described["added_tokens"]}
    unknown = described["model"].get("unk_token")

    def kind(token: str) -> int:
        if token == unknown:
            return UNKNOWN
        return BYTE if token.startswith("<0x") and token.endswith(">") and len(token) == 6 else added.get(token, NORMAL)

    padding = [f"[PAD{i}]" for i in range(len(tokens), size)]  # rows of the embedding that no token has
    writer.add_token_list(tokens + padding)
    writer.add_token_types([kind(token) for token in tokens] + [CONTROL] * len(padding))


def _add_special(writer: Any, described: dict[str, Any], config: Any) -> None:
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        token = getattr(config, f"{name}_token_id", None)
        if token is not None:
            add(token[0] if isinstance(token, list) else token)
    unknown = described["model"].get("unk_token")
    if unknown is not None:
        writer.add_unk_token_id(_tokens(described).index(unknown))
    template = (described.get("post_processor") or {}).get("single") or [{}]
    writer.add_add_bos_token("SpecialToken" in template[0])


def _chat_template(folder: Path) -> str | None:
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
