"""How far selections agree: pairs that two of them share, counted shard by shard, beside what chance would share.

S: selections. N: pairs of a shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage


def shared_pairs(shard: ShardRef, shared: tuple[Storage, Sequence[str]]) -> np.ndarray:
    """How many pairs of one shard each two selections have both kept, int64 [S, S]; on the diagonal what each kept.

    A pair is kept in one place of the corpus, so equal rows of a shard are equal pair_ids.

    Args:
        shard: Which.
        shared: The workspace, and the folders of the selections.
    """
    storage, folders = shared
    kept = [Artifact(storage, f"{one}/{shard.source}").read(shard.shard, ["row"])["row"].to_numpy() for one in folders]
    is_kept_SN = np.zeros((len(kept), 1 + max((int(row_K.max()) for row_K in kept if len(row_K)), default=0)))
    for is_kept_N, row_K in zip(is_kept_SN, kept):
        is_kept_N[row_K] = 1.0
    return (is_kept_SN @ is_kept_SN.T).astype(np.int64)  # in float64, which counts exactly and multiplies fast


def overlaps(selections: Sequence[Mapping[str, Any]], counts: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    r"""Every two selections: the pairs they share, \(|A \cap B|\), Jaccard's index, and what chance would share.

    Args:
        selections: `name` and `num_eligible` of each, S.
        counts: `shared_pairs` of every shard.

    Returns:
        `first`, `second`, `num_first`, `num_second`, `num_shared`, `jaccard` = \(|A \cap B| / |A \cup B|\), and
        `expected` = \(|A||B|/N\): the shared pairs to expect if one of the two had been drawn at random from the N
        pairs it could choose from (the larger such set of the two, where some lack a score).
    """
    total_SS = np.sum(counts, axis=0)
    found = []
    for one, other in combinations(range(len(selections)), 2):
        first, second, both = (int(total_SS[place]) for place in ((one, one), (other, other), (one, other)))
        chosen_from = max(selections[place]["num_eligible"] for place in (one, other))
        found.append(
            {
                "first": selections[one]["name"],
                "second": selections[other]["name"],
                "num_first": first,
                "num_second": second,
                "num_shared": both,
                "jaccard": both / (first + second - both),
                "expected": first * second / chosen_from,
            }
        )
    return found
