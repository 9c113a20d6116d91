"""Exact top 30 % of N scores with a quota for each of 8 strata: against window functions of Polars and DuckDB.

    python benchmarks/select_quota.py [--rows 1e7] [--shard-rows 100000] [--repeats 5] [--write]

Every side reads the same Parquet shards and keeps, of each aspect, its seats' worth of pairs by (score descending,
pair_id ascending); the pair_ids kept are compared before anything is timed. The peers are given the seats, which ours
works out. Besides the window functions, thresholds by stratum written out by hand in Polars are timed, without a goal.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
from harness import alternate, arguments, claim, finish, row
from score_shards import COLUMN, RATIO, Corpus, make_corpus, mask_of, select
from select_scale import Side, fastest, words

ASPECTS = (0.3, 0.2, 0.15, 0.12, 0.1, 0.07, 0.05, 0.01)
"""Their shares of the corpus."""
RULE = {"kind": "quota", "score": COLUMN, "by": ["aspect"], "ratio": RATIO}
GOALS = {"duckdb": "≥ 4 × the best", "polars": "≥ 4 × the best", "polars by hand": "-"}


def seats(sizes: dict[str, int]) -> dict[str, int]:
    """3/10 of each stratum by largest remainders, in whole numbers; a tie goes to the first by name."""
    k = sum(sizes.values()) * 3 // 10
    given = {name: size * k // sum(sizes.values()) for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(sizes[name] * k % sum(sizes.values())), name))
    for name in by_remainder[: k - sum(given.values())]:
        given[name] += 1
    return given


def duckdb_sides(files: list[str], given: dict[str, int]) -> dict[str, Side]:
    """row_number over each stratum; or a sort and a limit for each."""
    import duckdb

    scores = f"read_parquet({files})"
    ranked = "row_number() OVER (PARTITION BY aspect ORDER BY score DESC, pair_id)"
    limit = "CASE aspect " + " ".join(f"WHEN '{name}' THEN {count}" for name, count in given.items()) + " END"

    def qualify() -> np.ndarray:
        found = duckdb.sql(f"SELECT pair_id FROM {scores} QUALIFY {ranked} <= {limit}")
        return words([found.to_arrow_table()["pair_id"].combine_chunks()])

    def per_stratum() -> np.ndarray:
        one = "(SELECT pair_id FROM {} WHERE aspect = '{}' ORDER BY score DESC, pair_id LIMIT {})"
        found = duckdb.sql(" UNION ALL ".join(one.format(scores, *item) for item in given.items()))
        return words([found.to_arrow_table()["pair_id"].combine_chunks()])

    return {"window": qualify, "a limit per stratum": per_stratum}


def polars_sides(files: list[str], given: dict[str, int]) -> dict[str, Side]:
    """A sort, then a running number over each stratum; or a sort within each stratum."""
    import polars as pl

    scan = pl.scan_parquet(files).select("score", "pair_id", pl.col("aspect").cast(pl.String))
    limit = pl.col("aspect").replace_strict(given, return_dtype=pl.Int64)
    number = pl.int_range(pl.len())

    def after_sort() -> np.ndarray:
        best = scan.sort(["score", "pair_id"], descending=[True, False]).filter(number.over("aspect") < limit)
        return words(best.select("pair_id").collect().to_arrow()["pair_id"].chunks)

    def within() -> np.ndarray:
        order = pl.struct(-pl.col("score"), "pair_id").rank("ordinal").over("aspect")
        return words(scan.filter(order <= limit).select("pair_id").collect().to_arrow()["pair_id"].chunks)

    return {"sort, number over": after_sort, "rank over": within}


def by_hand_sides(files: list[str], given: dict[str, int], sizes: dict[str, int]) -> dict[str, Side]:
    """Columns in memory, a quantile per stratum, ties by pair_id: what a person could write instead of a window."""
    import polars as pl

    def thresholds() -> np.ndarray:
        rows = pl.scan_parquet(files).select("score", "aspect").collect()
        share = {name: (size - given[name] + 0.5) / max(1, size - 1) for name, size in sizes.items()}
        is_kept = np.zeros(len(rows), bool)
        for name, count in given.items():
            is_in = rows["aspect"] == name
            inside = rows["score"].filter(is_in)
            cut = inside.quantile(share[name], "lower")
            kept = is_in & (rows["score"] >= cut)
            surplus = int(kept.sum()) - count
            is_kept |= kept.to_numpy()
            if surplus:
                tied = (is_in & (rows["score"] == cut)).arg_true()
                ids = pl.scan_parquet(files).select("pair_id").collect()["pair_id"].gather(tied)
                is_kept[tied.to_numpy()[ids.arg_sort().to_numpy()[len(ids) - surplus :]]] = False
        return is_kept

    return {"thresholds": thresholds}


def stratum_sizes(corpus: Corpus) -> dict[str, int]:
    """Rows of each aspect."""
    import polars as pl

    counted = pl.scan_parquet(corpus.files).group_by(pl.col("aspect").cast(pl.String)).len().collect()
    return dict(sorted(counted.iter_rows()))


def compare(shape: str, corpus: Corpus, repeats: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Lines of the table for one shape, and how often ours read each column."""
    sizes = stratum_sizes(corpus)
    given = seats(sizes)
    bitmaps, reads = select(corpus, RULE)
    mask_N = mask_of(corpus, bitmaps)
    peers = {
        "duckdb": duckdb_sides(corpus.files, given),
        "polars": polars_sides(corpus.files, given),
        "polars by hand": by_hand_sides(corpus.files, given, sizes),
    }
    best = {name: fastest(corpus, mask_N, sides) for name, sides in peers.items()}
    sides: dict[str, Side] = {"ours": lambda: select(corpus, RULE)}
    times = alternate(sides | {name: side for name, (_, side) in best.items()}, repeats)
    lines = [
        row(f"{shape} / {name}", times["ours"], times[name], GOALS[name]) | {"peer": how}
        for name, (how, _) in best.items()
    ]
    return lines, dict(reads)


def check(shape: str) -> None:
    """What CI asserts: the peers' set, and how often each column is read."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(folder, shape, 200_000, 25_000, aspects=ASPECTS)
        bitmaps, reads = select(corpus, RULE)
        sizes = stratum_sizes(corpus)
        mask_N = mask_of(corpus, bitmaps)
        fastest(corpus, mask_N, duckdb_sides(corpus.files, seats(sizes)))
        fastest(corpus, mask_N, polars_sides(corpus.files, seats(sizes)))
        if (reads["score"], reads["aspect"]) != (1, 1):
            raise SystemExit(f"{shape}: columns read {dict(reads)} times, expected once")
        print(f"{shape}: {mask_N.sum():,} of {len(mask_N):,}, the peers' set; columns read {dict(reads)} times")


def main() -> None:
    options = arguments(__doc__, rows=1e7, shard_rows=100_000, shapes="normal,ties")
    if options.quick:
        for shape in options.shapes.split(","):
            check(shape)
        return
    num_rows = int(options.rows)
    lines, claims, reads = [], [], {}
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            corpus = make_corpus(folder, shape, num_rows, options.shard_rows, aspects=ASPECTS)
            found, reads[shape] = compare(shape, corpus, options.repeats)
        lines += found
        best = min((one for one in found if not one["case"].endswith("by hand")), key=lambda one: one["peer_s"])
        what = f"top {RATIO:.0%} of {num_rows:,} scores ({shape}) in {len(ASPECTS)} strata, {best['ours_s']:.2f} s"
        name = best["case"].split(" / ")[1]
        claims.append(claim(f"{what}; {name}: {best['peer']}", best["ratio"], "× the best peer", "≥ 4"))
        by_hand = found[-1]
        claims.append(claim(f"{what}; thresholds by hand", by_hand["ratio"], "× Polars by hand", "≥ 1"))
    columns = ["case", "peer", "ours_s", "peer_s", "ratio", "goal", "spread"]
    finish("select_quota", options, lines, columns, claims, ["duckdb", "polars"], reads=reads)


if __name__ == "__main__":
    main()
