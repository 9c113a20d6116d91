"""Hostile configurations, overrides, rules, places and model folders: kinds times values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

BASE: dict[str, Any] = {
    "name": "t",
    "sources": [{"name": "s", "paths": ["r.jsonl"], "map": {"prompt": "q", "chosen": "a", "rejected": "b"}}],
}
INF, NAN = float("inf"), float("nan")
VALUES: tuple[Any, ...] = (
    *(
        INF,
        -INF,
        NAN,
        2**63,
        2**64 - 1,
        -1,
        0,
        1e308,
        True,
        None,
        (),
        [],
        {},
        [[[]]],
        {"a": {"a": {}}},
        {1: 2},
        {None: 1},
    ),
    *("", "\0", "../x", "/abs", "a" * 100_000, "\x1b[2J", "²", "CON", "..", ".", b"x", "\u202e"),
)
KEYS = {
    "": (
        *("name", "sources", "ingest", "split", "models", "scorers", "metrics", "selections", "train", "ray", "report"),
        *("plugins", "exclude_prompts", "tangents", "duplicates", "generate", "selfplay", "evaluate"),
    ),
    "ingest": ("rows_per_shard", "max_row_mib", "max_quarantine_fraction"),
    "split": ("holdout", "proxy", "validation"),
    "ray": ("num_cpus", "object_store_gib", "address"),
    "source": ("name", "paths", "format", "map", "options", "carry", "role"),
}


def tables() -> Iterator[tuple[str, dict[str, Any]]]:
    """Configurations as tables, each with one value of the wrong kind, range or size; some happen to be valid."""
    for place, keys in KEYS.items():
        for key in keys:
            for number, value in enumerate(VALUES):
                name = f"{place}.{key}-{number}"
                if place == "source":
                    yield name, {**BASE, "sources": [{**BASE["sources"][0], key: value}]}
                elif place:
                    yield name, {**BASE, place: {key: value}}
                else:
                    yield name, {**BASE, key: value}
                    yield f"{name}-list", {**BASE, key: [value]}
                    yield f"{name}-kind", {**BASE, key: [{"kind": value, "name": value}]}


def yaml_texts() -> Iterator[tuple[str, str | bytes]]:
    """YAML that would be much, is its own part, or is none; not one of these is a configuration."""
    for wide in (5, 9, 30):
        for deep in (6, 9, 20):
            rows = [f"a0: &a0 [{','.join('x' * wide)}]"]
            rows += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * wide)}]" for n in range(1, deep)]
            yield f"laughs-{wide}-{deep}", "\n".join(rows)
            rows = ["a0: &a0 {" + ",".join(f"k{n}: x" for n in range(wide)) + "}"]
            rows += [
                f"a{n}: &a{n} {{" + ",".join(f"k{m}: *a{n - 1}" for m in range(wide)) + "}" for n in range(1, deep)
            ]
            yield f"laughs-table-{wide}-{deep}", "\n".join(rows)
    for text in ("&a [*a]", "a: &a {b: *a}", "a: &a [[*a]]", "&a {*a : 1}", "a: *b", "a: 1\na: 2", "a: {b: 1, 'b': 2}"):
        yield f"alias-{text}", text
    for depth in (100, 3_000, 100_000):
        for opening in ("[", "{", "- ", "? ", "{a: ", "[[{"):
            yield f"deep-{opening}-{depth}", opening * depth
    for scalar in (
        "2023-99-99",
        "9" * 5_000,
        "0x" + "f" * 20_000,
        "1:" * 100_000 + "1",
        "!!int x",
        "!!bool x",
        "!!timestamp x",
    ):
        yield f"scalar-{scalar[:20]}", f"name: {scalar}"
    for tag in (
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system",
        "!x y",
        "!!binary '='",
        "!!set {a}",
        "!!omap [a]",
    ):
        yield f"tag-{tag}", f"name: {tag}"
    for raw in (
        b"\xff\xfea\0",
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b'"\\ud800"',
        b"",
        b"3",
        b"- a",
        b"a\n---\nb",
        b"%YAML 9.9\n---\na: 1",
        b"\t",
    ):
        yield f"raw-{raw!r}", raw
    yield "long", b"#" * (2 << 20)
    yield "many", "- a\n" * 300_000


OVERRIDES = (
    *(
        "sources.²=1",
        "sources.².name=x",
        "sources.٣.name=x",
        "sources.9=1",
        "sources.-1=1",
        "sources." + "9" * 20 + "=1",
    ),
    *("=1", "", "a", "a=", "..=1", ".=1", "a..b=1", "sources.s=1", "name.x=1", "name=[", "name=&a [*a]", "name=*x"),
    *("name=!!python/none x", "a=" + "[" * 5_000, "x" * 100_000 + "=1", "a=\0", "a=\ud800", "sources.0.name=\x1b[2J"),
    *("ingest.max_row_mib=.inf", "ingest.max_row_mib=.nan", "ingest.max_row_mib=inf", "ingest.rows_per_shard=1e400"),
    *("a." * 5_000 + "b=1", "name=2020-99-99", "name=" + "1:" * 100_000 + "1"),
)


def rules() -> Iterator[tuple[str, Any]]:
    """Rules that are none, or lie in each other without end; some of the last kind happen to be valid."""
    top = {"kind": "top", "score": "score_x", "ratio": 0.5}
    for depth in (40, 3_000):
        deep: Any = top
        for _ in range(depth):
            deep = {"kind": "intersect", "rules": [deep]}
        yield f"deep-{depth}", deep
        yield f"deep-dedupe-{depth}", {"kind": "dedupe", "by": "prompt", "rule": deep}
    itself: dict[str, Any] = {"kind": "intersect"}
    itself["rules"] = [itself]
    yield "itself", itself
    for number, value in enumerate(VALUES):
        yield f"value-{number}", value
        yield f"kind-{number}", {"kind": value}
        for key in ("ratio", "score", "reverse", "count"):
            yield f"{key}-{number}", {**top, key: value}
        yield f"band-{number}", {"kind": "band", "score": "x", "low": value, "high": value}
        yield f"threshold-{number}", {"kind": "threshold", "score": "x", "low": value, "by": value}
        yield (
            f"fuse-{number}",
            {"kind": "fuse", "scores": ["a", "b"], "how": "rank", "weights": [value, value], "ratio": 0.1},
        )
        yield f"quota-{number}", {"kind": "quota", "score": "x", "by": value, "ratio": 0.1, "length_bins": value}
        yield f"random-{number}", {"kind": "random", "scores": ["a"], "seed": value, "count": 1}
    for ratio in ("1e-9999999", "1E-999999999", "1e999999999", "NaN", "sNaN", "Infinity", "0." + "1" * 100_000):
        yield f"ratio-{ratio[:12]}", {**top, "ratio": ratio}


PLACES = (
    *(
        "",
        "  ",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 5_000,
        "x/" * 3_000,
        "x" * 300,
        "~nobody-here",
        "~nobody-here/x",
        "~\0",
    ),
    *(
        "s3://",
        "gs://",
        "abfs://",
        "s3:///x",
        "file://",
        "file://host/x",
        "x://y",
        "://",
        "http://x/y",
        "hf://",
        "datasets:",
    ),
    *("/dev/null", "/dev/null/x", "/dev/zero", "/proc/self/mem", "/proc/x", "/sys/x", "fifo", "circle", "dangling"),
)
"""No source and no workspace lies there, in a folder that `test_places` makes."""
GLOBS = (
    *(
        "[z-a]*",
        "[]*",
        "[!]*",
        "[[]*",
        "[a&&b]*",
        "[--]*",
        "[^",
        "*[",
        "?" * 300,
        "*" * 4_000,
        "*a" * 30 + "b",
        "**/" * 30 + "x*",
    ),
    *("**a" * 9, "[a-z]" * 500 + "*", "*" * 10_000, "a**b**c*", "*\\*"),
)


def model_files() -> Iterator[tuple[str, str, bytes]]:
    """(name, file of the folder, what is written into it) for a folder that holds a model otherwise."""
    config = "config.json"
    for key, value in {
        **{"num_hidden_layers": 10**6, "vocab_size": 10**9, "hidden_size": 10**6, "intermediate_size": 10**9},
        **{"num_labels": 10**9, "num_attention_heads": 0, "head_dim": 10**9, "num_key_value_heads": 10**8},
        **{"attn_implementation": "evil/kernel", "hidden_act": "nope", "model_type": "nope", "dtype": "x"},
        **{"id2label": [1], "initializer_range": NAN, "tie_word_embeddings": "yes", "rope_parameters": "x"},
    }.items():
        yield f"{key}={value}", config, json.dumps({key: value}).encode()
    for key, value in {"num_hidden_layers": -1, "hidden_size": -4, "vocab_size": 1.5}.items():
        yield f"{key}={value}", config, json.dumps({key: value}).encode()
    for name, text in {
        "list": "[]",
        "empty": "",
        "number": "3",
        "deep": "[" * 100_000,
        "null": "null",
        "bytes": "\0\1",
    }.items():
        for file in (
            config,
            "tokenizer.json",
            "tokenizer_config.json",
            "adapter_config.json",
            "model.safetensors.index.json",
        ):
            yield f"{file}-{name}", file, text.encode()
    for name in ("pytorch_model.bin", "../model.safetensors", "/model.safetensors", "x.safetensors/../y.bin"):
        yield f"index-{name}", "model.safetensors.index.json", json.dumps({"weight_map": {"a": name}}).encode()
    for name, data in {
        **{"header": (2**60).to_bytes(8, "little") + b"x" * 99, "short": (10).to_bytes(8, "little") + b"x" * 99},
        **{"empty": b"", "zeros": b"\0" * 100, "pickle": b"\x80\x04\x95" + b"\0" * 99},
    }.items():
        yield f"weights-{name}", "model.safetensors", data
