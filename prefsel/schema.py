"""Arrow schemas of every artifact that stages exchange, and the names their columns follow.

A *group* is one prompt with its distinct completions; a *pair* points at two completions of a group by index.
Identifiers are blake2b-128, 16 raw bytes in storage and 32 hex digits wherever a person reads them.
"""

from __future__ import annotations

import pyarrow as pa

ID = pa.binary(16)
REST = "rest"
"""What a message holds besides role and content (tool calls, names, reasoning, tools), as the JSON of an object. Only
where a message of the shard has some; null in the others."""


def _message(has_rest: bool) -> pa.DataType:
    names = ("role", "content", REST) if has_rest else ("role", "content")
    return pa.struct([(name, pa.string()) for name in names])


def has_rest(groups: pa.Table) -> bool:
    """Whether a message of a shard of groups holds more than role and content; its ledger says so as `has_rest`."""
    return groups.schema.field("prompt").type != MESSAGES


def with_rest(table: pa.Table) -> pa.Table:
    """`table` with `rest` in its columns of messages, null where no message of them had any: all of a corpus alike."""
    plain, full = pa.list_(_message(False)), pa.list_(_message(True))
    return table.cast(pa.schema([one.with_type(full) if one.type == plain else one for one in table.schema]))


# The row in its file. The file itself is what the catalog lists the shard under: a path inside the shard would make
# two equal files two different shards.
PROVENANCE = pa.struct([("row", pa.int64())])


def groups_schema(*, has_rest: bool) -> pa.Schema:
    """Of a shard of groups; `has_rest` adds `rest` to every message."""
    messages = pa.list_(_message(has_rest))
    completion = pa.struct(
        [
            ("completion_id", ID),
            ("messages", messages),
            # Every number that came with the completion: per-aspect ratings, "score", the user's own columns.
            ("ratings", pa.map_(pa.string(), pa.float64())),
        ]
    )
    return pa.schema(
        [
            ("prompt_id", ID),
            ("prompt", messages),
            ("completions", pa.list_(completion)),
            ("provenance", PROVENANCE),
        ]
    )


def prompts_schema(*, has_rest: bool) -> pa.Schema:
    """Of a shard of prompts that a model answers."""
    return pa.schema(
        [
            ("prompt_id", ID),
            ("prompt", pa.list_(_message(has_rest))),
            # Of a prompt that a model made of another one: that one, and by which strategy.
            ("parent_id", ID),
            ("strategy", pa.string()),
        ]
    )


RESPONSES = "responses"
"""A further column of groups that models answered, aligned with `completions`: who wrote each one, which sample of the
prompt it is, why it ended (`end`, `length`) and how many tokens it has."""
RESPONSE = pa.struct(
    [("policy", pa.string()), ("sample", pa.int32()), ("stop", pa.string()), ("num_tokens", pa.int32())]
)
GENERATED = [("parent_id", ID), ("strategy", pa.string()), (RESPONSES, pa.list_(RESPONSE))]
"""What groups that a model answered have besides the columns of `GROUPS`."""

MESSAGES = pa.list_(_message(False))
GROUPS = groups_schema(has_rest=False)

PAIRS = pa.schema(
    [
        ("pair_id", ID),
        # The pair_id of the same two completions with the opposite label: a contradiction is a mirror_id that
        # exists as a pair_id, so it is found by hashing alone.
        ("mirror_id", ID),
        ("prompt_id", ID),
        ("chosen", pa.int32()),
        ("rejected", pa.int32()),
        ("aspect", pa.string()),
        ("label_margin", pa.float64()),
        ("provenance", PROVENANCE),
    ]
)

CARRIED = "carried"
"""A further column of pairs, where their source carries fields of its rows: each field's text by its path. A field that
a row has not is not in the map; a shard whose source carries nothing has no such column."""


def pairs_schema(*, has_carried: bool) -> pa.Schema:
    """Of a shard of pairs."""
    return PAIRS.append(pa.field(CARRIED, pa.map_(pa.string(), pa.string()))) if has_carried else PAIRS


QUARANTINE = pa.schema(
    [
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("byte_position", pa.int64()),
        ("raw", pa.large_binary()),
    ]
)

SCORES = pa.schema(
    [
        ("pair_id", ID),
        ("score", pa.float64()),
        # Null for an eligible pair; otherwise why it cannot be selected (holdout, duplicate, missing_<column>, …).
        ("dropped", pa.dictionary(pa.int8(), pa.string())),
        ("source", pa.dictionary(pa.int16(), pa.string())),
        ("aspect", pa.dictionary(pa.int16(), pa.string())),
        # Of the two completions, in the length unit of the reports; null where unknown. Shards of earlier versions
        # have none: their lengths are counted again from the groups.
        ("chosen_length", pa.int32()),
        ("rejected_length", pa.int32()),
    ]
)

SELECTION = pa.schema(
    [
        ("pair_id", ID),
        ("prompt_id", ID),
        ("score", pa.float64()),
        ("percentile", pa.float64()),
        ("stratum", pa.string()),
        ("row", pa.int64()),
    ]
)

FLIPPED = "flipped"
"""A further column of selections, datasets and exports, bool, where the rule may turn labels: whether chosen and
rejected are exchanged, with every number of either side. `pair_id` stays that of the pair as it was labelled."""


TRAINED_ON = "trained_on.parquet"
"""The prompt_ids that a model was trained on, one column `prompt_id`, in the folder of its weights."""


SAME_AS = "same_as"
"""A further column of completion-column shards in which some completions of a group are the same tokens to the model,
int32 lists: the position of the first one of the group with these tokens, null for that one itself. A null list stands
for a group whose completions all differ; a shard without such completions has no such column."""


def columns_schema(names: list[str]) -> pa.Schema:
    """Schema of a completion-column shard: one float64 list per name, aligned with `completion_ids`."""
    return pa.schema(
        [("prompt_id", ID), ("completion_ids", pa.list_(ID))] + [(name, pa.list_(pa.float64())) for name in names]
    )
