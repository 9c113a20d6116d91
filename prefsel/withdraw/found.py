"""What is taken back with what is asked for, and where it lies: nothing is written here.

With a pair go its two completions, and every other pair that one of them is of, under any aspect or label. Its prompt
goes when no pair of it is left. With a prompt goes all of it, and prompts that a model made of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import UserError
from prefsel.schema import CARRIED
from prefsel.withdraw.corpora import Corpus, corpora, file_records, uris_of
from prefsel.withdraw.keys import Asked, RowKey
from prefsel.withdraw.others import models_that_saw, other_files
from prefsel.withdraw.tables import COMPLETION_IDS, Completions, completions_of, is_among
from prefsel.withdraw.texts import Texts
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.withdrawals import WITHDRAWN, Gone, Withdrawal, hex_sorted, read_gone

IDS = ["prompt_id", COMPLETION_IDS]


@dataclass
class Search:
    """What was found so far."""

    storage: Storage
    corpora: list[Corpus]
    pairs: set[bytes] = field(default_factory=set)
    prompts: set[bytes] = field(default_factory=set)
    completions: set[bytes] = field(default_factory=set)
    rows: set[bytes] = field(default_factory=set)
    shards: set[str] = field(default_factory=set)
    quarantine: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    met: set[Any] = field(default_factory=set)
    """Keys that name something."""

    @property
    def gone(self) -> Gone:
        """As sets that are looked up."""
        return Gone(*(frozenset(many) for many in (self.prompts, self.completions, self.pairs, self.rows)))


def find(storage: Storage, asked: Asked, why: str) -> Withdrawal | None:
    """What is taken back, as a record that is not written yet; None where all of it was before.

    Raises:
        UserError: names what is not in the workspace.
        DamagedError: something that has to be read is damaged.
    """
    search = Search(storage, corpora(storage))
    touched = _asked_pairs(search, asked)
    _asked_prompts(search, asked)
    _quarantined(search, asked)
    _emptied_prompts(search, touched)
    _made_of_them(search)
    _all_of_them(search)
    _quarantined(search, Asked())
    _require_known(search, asked)
    if not search.gone:
        return None
    return Withdrawal(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        why=why,
        prompts=hex_sorted(search.prompts),
        completions=hex_sorted(search.completions),
        pairs=hex_sorted(search.pairs),
        rows=hex_sorted(search.rows),
        shards=sorted(search.shards),
        quarantine=sorted(search.quarantine),
        files=other_files(storage, search.gone, search.texts),
        models=models_that_saw(storage, search.gone, search.shards),
    )


def _require_known(search: Search, asked: Asked) -> None:
    """Refuse keys that name nothing, now or before it was taken back.

    Raises:
        UserError: names the first of them.
    """
    before = read_gone(search.storage)
    ids = asked.pairs | asked.prompts | asked.either
    unknown = [one.hex() for one in sorted(ids - search.met - before.pairs - before.prompts)]
    # What rows carried is not known any more once they are taken back.
    unknown += sorted(map(str, (asked.rows if before else asked.rows | asked.fields) - search.met))
    if unknown:
        more = f", and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
        raise UserError(f"withdraw: not in this workspace: {', '.join(unknown[:5])}{more}; nothing was changed")


def _asked_pairs(search: Search, asked: Asked) -> set[bytes]:
    """Take back the completions of pairs that are asked for; returns the prompts that files gave these pairs to."""
    ids, touched = asked.pairs | asked.either, set[bytes]()
    if not (ids or asked.rows or asked.fields):
        return touched
    for corpus in search.corpora:
        uris = {} if corpus.is_made else uris_of(file_records(search.storage, corpus.source))
        for artifact in corpus.pairs:
            for shard in artifact.entries():
                pairs = artifact.read(shard)
                mine_N = is_among(pairs["pair_id"], ids)
                search.met |= set(pairs["pair_id"].filter(pa.array(mine_N)).to_pylist())
                mine_N |= _keyed(search, pairs, corpus.source, uris.get(shard, []), asked)
                if not mine_N.any():
                    continue
                hits = pairs.filter(pa.array(mine_N))
                groups = corpus.groups.read(shard, IDS)
                search.completions |= {one for sides in _sides(hits, groups) for one in sides}
                if not corpus.is_made:
                    touched |= set(hits["prompt_id"].to_pylist())
    return touched


def _keyed(search: Search, pairs: pa.Table, source: str, uris: list[str], asked: Asked) -> np.ndarray:
    """Which pairs of a shard have a row or a carried field that is asked for."""
    row_N = pc.struct_field(pairs["provenance"].combine_chunks(), "row").to_numpy(zero_copy_only=False)
    mine_N = _at_rows(search, row_N, asked.in_files(source, uris))
    wanted = asked.by_field.get(source, {})
    if wanted and CARRIED in pairs.column_names:
        for place, carried in enumerate(pairs[CARRIED].to_pylist()):
            found = {wanted[one] for one in carried or () if one in wanted}
            mine_N[place] |= bool(found)
            search.met |= found
    return mine_N


def _at_rows(search: Search, row_N: np.ndarray, keys: Sequence[Mapping[int, RowKey]]) -> np.ndarray:
    """Which rows have a key, in any of some files; the keys are met."""
    found_N = [[rows[row] for rows in keys if row in rows] for row in row_N.tolist()]
    search.met.update(*found_N)
    return np.array([bool(found) for found in found_N], bool)


def _sides(pairs: pa.Table, groups: pa.Table) -> Iterator[tuple[bytes, bytes]]:
    """The completion_ids of both sides of pairs."""
    rows = {one: row for row, one in enumerate(groups["prompt_id"].to_pylist())}
    lists = groups["completions"]
    for pair in pairs.select(["prompt_id", "chosen", "rejected"]).to_pylist():
        completions = lists[rows[pair["prompt_id"]]].as_py()
        yield completions[pair["chosen"]]["completion_id"], completions[pair["rejected"]]["completion_id"]


def _asked_prompts(search: Search, asked: Asked) -> None:
    """Take back prompts that are asked for, and those of sources of prompts by their row."""
    ids, unmet = asked.prompts | asked.either, Asked(rows=asked.rows - search.met)
    for corpus in search.corpora:
        uris = {} if corpus.is_made else uris_of(file_records(search.storage, corpus.source))
        keys = corpus.source in unmet.by_file
        for shard in corpus.groups.entries() if ids or keys else ():
            groups = corpus.groups.read(shard, ["prompt_id", "provenance"])
            mine_N = is_among(groups["prompt_id"], ids)
            search.met |= set(groups["prompt_id"].filter(pa.array(mine_N)).to_pylist())
            row_N = pc.struct_field(groups["provenance"].combine_chunks(), "row").to_numpy(zero_copy_only=False)
            mine_N |= _at_rows(search, row_N, unmet.in_files(corpus.source, uris.get(shard, [])))
            search.prompts |= set(groups["prompt_id"].filter(pa.array(mine_N)).to_pylist())


def _emptied_prompts(search: Search, touched: set[bytes]) -> None:
    """Take back the prompts of which no pair of any file is left."""
    left = set[bytes]()
    for corpus in search.corpora if touched else ():
        for artifact in () if corpus.is_made else corpus.pairs:
            for shard in artifact.entries():
                pairs = artifact.read(shard, ["prompt_id", "chosen", "rejected"])
                pairs = pairs.filter(pa.array(is_among(pairs["prompt_id"], touched)))
                if pairs.num_rows:
                    groups = corpus.groups.read(shard, IDS)
                    for prompt, sides in zip(pairs["prompt_id"].to_pylist(), _sides(pairs, groups)):
                        left |= set() if search.completions.intersection(sides) else {prompt}
    search.prompts |= touched - left


def _made_of_them(search: Search) -> None:
    """Take back prompts that a model made of a prompt that is taken back, and those made of these."""
    children: dict[bytes, set[bytes]] = {}
    artifacts = [Artifact(search.storage, f"prompts/{name}") for name in search.storage.folders("prompts")]
    for artifact in (*artifacts, *(one.groups for one in search.corpora if one.is_made)):
        for shard in artifact.entries():
            table = artifact.read(shard, ["prompt_id", "parent_id"])
            for child, parent in zip(table["prompt_id"].to_pylist(), table["parent_id"].to_pylist()):
                if parent is not None:
                    children.setdefault(parent, set()).add(child)
    waiting = list(search.prompts)
    while waiting:
        new = children.pop(waiting.pop(), set()) - search.prompts
        search.prompts |= new
        waiting += new


def _all_of_them(search: Search) -> None:
    """Where any of it lies: shards of groups, the other pairs and completions that go too, and its texts."""
    for corpus in search.corpora:
        for shard in corpus.groups.entries():
            found = completions_of(corpus.groups.read(shard, IDS), search.gone)
            if not found.all_stay:
                search.shards.add(f"{corpus.source}/{shard}")
                _texts(search, corpus.groups.read(shard), found)
    for corpus in search.corpora:
        for artifact in corpus.pairs:
            for shard in artifact.entries():
                if f"{corpus.source}/{shard}" not in search.shards:
                    continue
                pairs = artifact.read(shard, ["pair_id", "prompt_id", "chosen", "rejected"])
                for pair_id, sides in zip(pairs["pair_id"].to_pylist(), _sides(pairs, corpus.groups.read(shard, IDS))):
                    if search.completions.intersection(sides):
                        search.pairs.add(pair_id)


def _texts(search: Search, groups: pa.Table, found: Completions) -> None:
    """Keep ids of the completions that go with their prompt, and what was said in all of them."""
    for row in np.unique(np.concatenate([found.group_M[~found.stays_M], np.flatnonzero(~found.stays_N)])).tolist():
        group = groups.slice(row, 1).to_pylist()[0]
        is_prompt_gone = group["prompt_id"] in search.prompts
        if is_prompt_gone and group["prompt"]:  # what comes before it, such as a system prompt, is that of others too
            search.texts.add((group["prompt"][-1]["content"] or "").strip())
        for one in group["completions"]:
            if is_prompt_gone or one["completion_id"] in search.completions:
                search.completions.add(one["completion_id"])
                search.texts |= {(message["content"] or "").strip() for message in one["messages"]}


def _quarantined(search: Search, asked: Asked) -> None:
    """Rows of the quarantine that are asked for by their place, or say what is taken back."""
    texts, hex_ids = Texts(search.texts), {one.hex() for one in search.prompts}
    for source in search.storage.folders("quarantine"):
        artifact = Artifact(search.storage, f"quarantine/{source}")
        for shard in artifact.entries() if source in asked.by_file or texts.whole or hex_ids else ():
            rows = artifact.read(shard, ["reason", "file", "row", "raw"]).to_pylist()
            of_file = {file: asked.in_files(source, [file]) for file in {row["file"] for row in rows}}
            for row in rows:
                named = {keys[row["row"]] for keys in of_file[row["file"]] if row["row"] in keys}
                search.met |= named
                if row["reason"] != WITHDRAWN and (named or _says(row["raw"], texts, hex_ids)):
                    search.rows.add(bytes.fromhex(digest(row["raw"])))
                    search.quarantine.add(f"{source}/{shard}")


def _says(raw: bytes, texts: Texts, hex_ids: set[str]) -> bool:
    """Whether a row as it was read holds a text, or the id of a prompt, that is taken back."""
    try:
        strings = list(_strings(json.loads(raw)))
    except (ValueError, RecursionError):
        return texts.within(raw.decode(errors="replace"), short=True)
    return any(one.strip() in texts.whole or one in hex_ids or texts.within(one, short=False) for one in strings)


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)
