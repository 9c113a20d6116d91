"""What every sample of a policy said, of groups that hold each text once.

No pair can be made of two equal responses, so a group has a text once and the samples that said it again lie in the
quarantine. But they were said: what is measured of a policy counts a text as often as it came.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REPEATED = "duplicate_response"
"""Why a response that an earlier sample gave lies in the quarantine."""


def sample_places(
    groups: Iterable[Mapping[str, Any]], quarantined: Iterable[tuple[str, bytes]]
) -> dict[bytes, list[int]]:
    """Which completion of its group each sample of a prompt said, samples in their order; those of no use left out.

    Args:
        groups: Rows of a shard of answers, with `prompt_id`, `completions` and `responses`.
        quarantined: `reason` and `raw` of the rows of its quarantine.

    Returns:
        prompt_id → places in `completions`, at least one each.
    """
    repeated: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for reason, raw in quarantined:
        if reason == REPEATED:
            said = json.loads(raw)
            repeated[said["prompt_id"]].append((said["sample"], said["text"]))
    found = {}
    for row in groups:
        places = {_text(one["messages"]): place for place, one in enumerate(row["completions"])}
        samples = [(one["sample"], place) for place, one in enumerate(row["responses"])]
        # What repeats a text of no use is of none either.
        samples += [(number, places[text]) for number, text in repeated[row["prompt_id"].hex()] if text in places]
        found[row["prompt_id"]] = [place for _, place in sorted(samples)]
    return found


def _text(messages: Sequence[Mapping[str, Any]]) -> str:
    (said,) = messages
    return str(said["content"])
