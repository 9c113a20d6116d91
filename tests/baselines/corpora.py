"""Small corpora and stand-ins for pretrained models, written as text: the same bytes on every machine."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DEMO_ASPECTS = ("coverage", "sobriety", "courtesy", "conciseness")
ULTRAFEEDBACK_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
WORDS = ("red", "green", "blue", "small", "large", "round", "old", "new", "fast", "slow", "warm", "cold", "near", "far")


def draw(*what: Any, below: int) -> int:
    """A number from 0 to `below` - 1 that follows from `what`."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "big") % below


def text(*what: Any, longest: int = 9) -> str:
    return " ".join(WORDS[draw(what, n, below=len(WORDS))] for n in range(1 + draw(what, below=longest)))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------- one corpus per format


def ultrafeedback(aspects: Sequence[str], num_prompts: int = 80) -> list[dict[str, Any]]:
    """Prompts with four rated completions each, in the shape of UltraFeedback; some ratings are missing."""
    rows = []
    for prompt in range(num_prompts):
        completions = []
        for k in range(4):
            ratings = {name: str(1 + draw("rating", prompt, k, name, below=5)) for name in aspects}
            if draw("missing", prompt, k, below=20) == 0:
                ratings[aspects[0]] = "N/A"
            annotations = {name: {"Rating": rating} for name, rating in ratings.items()}
            overall = 1 + draw("overall", prompt, k, below=10)
            response = f"answer {k} {text('answer', prompt, k)}"
            completions.append({"response": response, "annotations": annotations, "overall_score": overall})
        instruction = f"question {prompt}: {text('question', prompt)}?"
        rows.append({"source": "made", "instruction": instruction, "completions": completions})
    return rows


def transcripts(name: str, num_pairs: int = 40) -> list[dict[str, Any]]:
    """Pairs in the shape of HH-RLHF: two whole transcripts that share their beginning."""
    rows = []
    for n in range(num_pairs):
        shared = f"\n\nHuman: {name} {n} {text(name, n)}"
        if draw(name, "turns", n, below=2):
            shared += f"\n\nAssistant: {text(name, 'first', n)}\n\nHuman: and {text(name, 'then', n)}?"
        sides = (f"{shared}\n\nAssistant: {side} {text(name, side, n)}" for side in ("good", "bad"))
        rows.append(dict(zip(("chosen", "rejected"), sides)))
    return rows


def binarized(num_pairs: int = 60) -> list[dict[str, Any]]:
    """Pairs in the shape of ultrafeedback_binarized: a prompt beside conversations that repeat it, with scores."""
    rows = []
    for n in range(num_pairs):
        prompt = f"tell me about {n} {text('binarized', n)}"
        row: dict[str, Any] = {"prompt": prompt}
        for side in ("chosen", "rejected"):
            answer = {"role": "assistant", "content": f"{side} {text('binarized', side, n)}"}
            row[side] = [{"role": "user", "content": prompt}, answer]
            row[f"score_{side}"] = draw("score", side, n, below=9) / 2
        rows.append(row)
    return rows


SCORES = ("tied", "offset", "wide", "gaps")
RATINGS = ("help", "truth", "brief")
LABELS = ((0, 1, "help"), (1, 0, "truth"), (2, 3, "brief"), (4, 0, None), (3, 1, "help"), (2, 4, "truth"))
"""Chosen, rejected and aspect of a prompt's pairs; the first two are of the same completions."""


def scored_pairs(source: str, num_prompts: int) -> list[dict[str, Any]]:
    """Six pairs a prompt with numbers of every kind; dyadic, so that their differences are exact.

    `tied` has four values, `offset` lies far from 0 in small steps, `wide` runs over many powers of two and both
    signs, `gaps` lacks some. The ratings are whole numbers.
    """
    rows = []
    for prompt in range(num_prompts):
        numbers = [_numbers(source, prompt, k) for k in range(5)]
        texts = [f"answer {k} {text(source, prompt, k, longest=14)}" for k in range(5)]
        for chosen, rejected, aspect in LABELS:
            row = {"prompt": f"{source} {prompt}", "chosen": texts[chosen], "rejected": texts[rejected]}
            row["aspect"] = aspect
            for side, k in (("chosen", chosen), ("rejected", rejected)):
                row |= {f"{name}_{side}": value for name, value in numbers[k].items()}
            rows.append(row)
    return rows


def _numbers(source: str, prompt: int, k: int) -> dict[str, float]:
    where = (source, prompt, k)
    sign = (-1) ** draw("sign", *where, below=2)
    numbers = {
        "tied": (-1.0, 0.0, 0.5, 2.0)[draw("tied", *where, below=4)],
        "offset": 2.0**20 + draw("offset", *where, below=4096) / 4096,
        "wide": sign * (1 + draw("wide", *where, below=256) / 256) * 2.0 ** (draw("power", *where, below=40) - 20),
        **{name: float(1 + draw(name, *where, below=5)) for name in RATINGS},
    }
    if draw("gaps", *where, below=12):
        numbers["gaps"] = draw("gap value", *where, below=1024) / 64
    return numbers


# ------------------------------------------------------------------------------- stand-ins for pretrained models


def pretrained(folder: Path, heads: Sequence[str], *, max_length: int) -> str:
    """A directory that can be named, opened as configuration and tokenizer, and not run: its weights are empty."""
    words = ["<pad>", "<bos>", "<eos>", *WORDS]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    labels = {"id2label": {str(n): head for n, head in enumerate(heads)}}
    labels |= {"label2id": {head: n for n, head in enumerate(heads)}}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(words), **sizes}
    config |= {"max_position_embeddings": 8192, **labels}
    tokens = {"vocab": {word: n for n, word in enumerate(words)}, "unk_token": "<pad>", "type": "WordLevel"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": tokens,
        **parts,
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "pad_token": "<pad>"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", names)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return str(folder)
