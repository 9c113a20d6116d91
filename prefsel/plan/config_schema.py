"""The JSON schema of a configuration file, for editors, checks outside of `prefsel`, and the reference in `docs/`.

`Config` keeps rules and the parameters of metrics as plain tables, because their records lie above it in the import
order; here they are joined, so that a file is described down to its last key.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from prefsel.config import Config
from prefsel.ingest.formats import FORMATS
from prefsel.metrics import METRICS
from prefsel.rules import Rule

BASE = {
    "type": "string",
    "description": (
        "Another configuration file, whose path is relative to this one. Its keys are the ground that this file's are "
        "laid over: tables key by key, everything else as a whole, lists too."
    ),
}


def full_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration file, with every rule and every metric's parameters.

    It describes one file as it is written: with `base` the required keys may stand in the other file. What the records
    check beyond types and ranges, such as which options go together, it does not say.
    """
    schemas, shared = TypeAdapter.json_schemas(
        [
            ("config", "validation", TypeAdapter(Config)),
            ("rule", "validation", TypeAdapter(Rule)),
            *((f"metric {name}", "validation", TypeAdapter(metric.params)) for name, metric in METRICS.items()),
        ]
    )
    records = shared["$defs"]
    file = records.pop("Config")
    records["Rule"] = schemas["rule", "validation"] | {"title": "Rule"}
    selection, metric = records["Selection"]["properties"], records["MetricSpec"]
    selection["rule"] = {"$ref": "#/$defs/Rule", "description": selection["rule"]["description"]}
    metric["properties"]["metric"]["enum"] = list(METRICS)
    metric["allOf"] = [_parameters(name, schemas[f"metric {name}", "validation"], records) for name in METRICS]
    records["Source"]["properties"]["format"]["enum"] = ["auto", *FORMATS]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **{key: value for key, value in file.items() if key != "required"},
        "properties": {"base": BASE, **file["properties"]},
        "anyOf": [{"required": ["base"]}, {"required": file["required"]}],
        "$defs": records,
    }


def _parameters(metric: str, params: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    """What `params` must be where a metric's name is `metric`; it may be left out where none of them is required."""
    record = records[params["$ref"].removeprefix("#/$defs/")]
    needs = {"required": ["params"]} if record.get("required") else {}
    return {
        "if": {"properties": {"metric": {"const": metric}}, "required": ["metric"]},
        "then": {"properties": {"params": params}, **needs},
    }
