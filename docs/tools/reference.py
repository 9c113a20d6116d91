"""Write docs/configuration.md from the schema: every key of a configuration, its type, its default and its meaning.

python docs/tools/reference.py            # a test compares the committed page with what this writes
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefsel.plan.config_schema import full_schema

PAGE = Path(__file__).resolve().parents[1] / "configuration.md"
INTRO = """\
<!-- Written by docs/tools/reference.py from the docstrings of the configuration's records: edit those. -->

# Configuration

A run is one YAML file. Every key is listed here with its type, its default and its meaning; a key that is marked
required must be given. An unknown key is an error that names the nearest valid one.

```bash
prefsel run CONFIG.yaml --workspace W --set train.dpo.learning_rate=1e-6 --set 'sources.hh.paths=[a.jsonl.gz]'
```

`--set dotted.key=value` overrides a key of the file and may be repeated. The value is read as YAML, and an entry of a
list is addressed by its `name` (a scorer by its `model`) or by its number. Secrets such as object-store keys do not
belong in the file; they are read from the environment.

`prefsel config-schema > prefsel.schema.json` prints the same as a JSON schema. An editor with a YAML language server
checks a file as you write it when the first line is `# yaml-language-server: $schema=prefsel.schema.json`. Which
options go together is checked when a command starts, before anything is computed.

The ready configurations in `jobs/configs/` are a place to start: [UltraFeedback with a 1.5 B policy on one
GPU](../jobs/configs/ultrafeedback_1p5b_1gpu.yaml), [an 8 B policy on eight
GPUs](../jobs/configs/ultrafeedback_8b_8gpu.yaml), [HH-RLHF](../jobs/configs/hh_rlhf_1p5b_1gpu.yaml), and one for each
of the [methods](methods.md).
"""
WORDS = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
PLUGIN = "a kind of your own"
SHARED = "what several kinds share"
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")


def reference() -> str:
    """The page as Markdown."""
    anchors: dict[str, str] = {}
    Page(full_schema(), anchors).write()  # once to learn where each record stands, once with the links
    return Page(full_schema(), anchors).write()


class Page:
    """The page in the making; a record has its section where it is first used."""

    def __init__(self, schema: Mapping[str, Any], anchors: dict[str, str]) -> None:
        self.schema, self.records, self.anchors = schema, schema["$defs"], anchors
        self.lines: list[str] = [INTRO]
        self.written: set[str] = set()
        self.top = ""

    def write(self) -> str:
        """All sections."""
        properties = self.schema["properties"]
        sections = {key: members for key, field in properties.items() if (members := self.members(field))}
        self.heading(2, "The file")
        self.keys(properties, required=self.schema["anyOf"][1]["required"], sections=sections)
        for key, members in sections.items():
            self.top = key
            self.heading(2, key)
            self.section(key, members)
        return "\n".join(self.lines).rstrip() + "\n"

    def section(self, key: str, members: dict[str, str]) -> None:
        """The records that a key of the file holds: one, or several kinds of them."""
        if list(members) == [""]:
            self.place(members[""], key)
            self.record(members[""], {})
            return
        shared = self.shared(members.values())
        for kind, name in members.items():
            self.place(name, f"{key}: {kind}")
        self.lines.append("An entry is of one of these kinds: " + ", ".join(map(self.link, members.values())) + ".\n")
        for kind, name in members.items():
            self.heading(3, f"{key}: `{kind}`")
            common = [field for field, value in shared.items() if self.records[name]["properties"].get(field) == value]
            self.record(name, {field: shared[field] for field in common})
            if common:
                names = ", ".join(f"`{field}`" for field in common)
                self.lines.append(f"See [{SHARED}](#{slug(f'{key}: {SHARED}')}) for {names}.\n")
        if shared:
            self.heading(3, f"{key}: {SHARED}")
            required = {field for name in members.values() for field in self.records[name].get("required", [])}
            self.keys(shared, required=required)
            self.below(shared)

    def record(self, name: str, elsewhere: Mapping[str, Any]) -> None:
        """One record: what it is, its keys but those described elsewhere, and the records they are the first to use."""
        record = self.records[name]
        self.lines.append(text(record["description"]) + "\n")
        own = {field: value for field, value in record["properties"].items() if field not in elsewhere}
        self.keys(own, required=record.get("required", []))
        self.below(own)
        for branch in record.get("allOf", []):  # the parameters of a metric
            metric = branch["if"]["properties"]["metric"]["const"]
            (params,) = references(branch["then"])
            self.heading(3, f"metric: `{metric}`")
            self.lines.append(f"[What it looks for](methods.md#{metric}), its formula, its cost and its traps.\n")
            self.keys(self.records[params]["properties"], required=self.records[params].get("required", []))
            self.below(self.records[params]["properties"])

    def below(self, fields: Mapping[str, Any]) -> None:
        """Sections of the records that these keys are the first to use."""
        found = [(key, kind, name) for key, field in fields.items() for kind, name in self.members(field).items()]
        found = [(key, kind, name) for key, kind, name in found if name not in self.written]
        titles = []
        for key, kind, name in found:
            titles.append(f"{key}: `{kind}`" if kind else self.title(key, name))
            self.place(name, titles[-1].replace("`", ""))
        for title, (_, _, name) in zip(titles, found):
            self.heading(3, title)
            self.record(name, {})

    def title(self, key: str, name: str) -> str:
        """What the section of a record is called: its key, after that of the file where the key alone says too little.

        That is so of a key that is called like a section of the file, or like the section of another record.
        """
        others = {anchor for other, anchor in self.anchors.items() if other != name}
        return f"{self.top}: {key}" if key in self.schema["properties"] or slug(key) in others else key

    def place(self, name: str, title: str) -> None:
        """Remember where a record's section stands."""
        self.written.add(name)
        self.anchors[name] = slug(title)

    def link(self, name: str) -> str:
        """A link to the section of a record of some kind."""
        kind = self.records[name]["properties"].get("kind", {}).get("const", PLUGIN)
        return f"[`{kind}`](#{self.anchors.get(name, '')})"

    def members(self, field: Any) -> dict[str, str]:
        """The records that a key holds, by their `kind` (empty where there is none); lists and unions are opened."""
        found: dict[str, str] = {}
        for name in references(field):
            record = self.records[name]
            if "properties" in record:
                found[record["properties"].get("kind", {}).get("const", "")] = name
            else:  # a union with a name: the rules
                found |= self.members(record)
        if "" in found and len(found) > 1:  # of plugins, whose own keys no schema knows
            found[PLUGIN] = found.pop("")
        return found

    def shared(self, names: Iterable[str]) -> dict[str, Any]:
        """The keys that several records define alike, other than their names."""
        seen: list[tuple[str, Any]] = [pair for name in names for pair in self.records[name]["properties"].items()]
        return {field: value for field, value in seen if field != "name" and seen.count((field, value)) > 1}

    # ------------------------------------------------------------------------------------------------ one key

    def keys(self, fields: Mapping[str, Any], *, required: Iterable[str], sections: Iterable[str] = ()) -> None:
        """A list with one entry per key, the kind and the name first; `sections` are keys with a section of theirs."""
        needed = set(required)
        for name in sorted(fields, key=lambda name: {"kind": 0, "name": 1}.get(name, 2)):
            field = fields[name]
            kind = LINK.sub(r"\1", self.type(field)) if name in sections else self.type(field)
            facts = [kind, "" if "const" in field else default(field, is_required=name in needed)]
            shown = f"[`{name}`](#{slug(name)})" if name in sections else f"`{name}`"
            self.lines.append(f"- **{shown}** ({', '.join(filter(None, facts))}). {text(field['description'])}")
        self.lines.append("")

    def type(self, field: Mapping[str, Any]) -> str:
        """The type of a value in words; a table links to its section."""
        if "const" in field:
            return f"`{field['const']}`"
        if "enum" in field:
            *first, last = (f"`{value}`" for value in field["enum"])
            return f"{', '.join(first)} or {last}" if first else last
        if members := self.members(field):
            word = "list of tables" if field.get("type") == "array" else "table"
            anchor = self.anchors.get(next(iter(members.values())), "")
            shown = f"[{word}](#{anchor})" if list(members) == [""] else word  # a union's kinds follow their key
            return shown + (" or null" if {"type": "null"} in field.get("anyOf", []) else "")
        if "anyOf" in field:
            return " or ".join(self.type(one) for one in field["anyOf"])
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])} numbers"
        if field["type"] == "array":
            return f"list of {self.type(field['items'])}"
        return "table" if field["type"] == "object" else WORDS[field["type"]] + limits(field)

    def heading(self, level: int, title: str) -> None:
        """A heading; `slug` is the anchor that both GitHub and MkDocs give it."""
        self.lines.append(f"{'#' * level} {title}\n")


def text(description: str) -> str:
    """A docstring as Markdown, one line per paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", description))


def limits(field: Mapping[str, Any]) -> str:
    """The range of a number."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    shown = " and ".join(f"{sign} {number(field[key])}" for key, sign in signs.items() if key in field)
    return f" {shown}" if shown else ""


def number(value: float) -> str:
    """A bound as people write it."""
    return f"2^{math.log2(value):g}" if value > 1e15 else f"{value:g}"


def default(field: Mapping[str, Any], *, is_required: bool) -> str:
    """What holds when the key is left out."""
    if is_required:
        return "required"
    value = field.get("default", {})
    if isinstance(value, dict):
        return "optional"
    return f"default `{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def references(node: Any) -> Iterator[str]:
    """Names of the records that a part of the schema refers to, in order."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rsplit("/", 1)[1]
        for key, below in node.items():
            if key != "discriminator":
                yield from references(below)
    elif isinstance(node, list):
        for below in node:
            yield from references(below)


def slug(title: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
