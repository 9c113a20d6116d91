"""Exact top 30 % of N scores with a quota for each of 8 strata: the stage against windows of Polars and DuckDB.

    python benchmarks/select_quota.py [--rows 1e7] [--shard-rows 100000] [--repeats 5] [--write]

Stage and mechanism are those of `select_scale`. Every peer reads the same Parquet shards and writes, of each aspect,
its seats' worth of pair_ids by (score descending, pair_id ascending) to one Parquet file; what is kept is compared
before anything is timed. The peers are given the seats, which ours works out. Besides the window functions, thresholds
by stratum written out by hand in Polars are timed, without a goal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from harness import alternate, arguments, claim, finish, row
from score_shards import COLUMN, RATIO, Corpus, counted_reads, make_corpus, started_ray
from select_scale import ONCE, Side, copy, fastest

ASPECTS = (0.3, 0.2, 0.15, 0.12, 0.1, 0.07, 0.05, 0.01)
"""Their shares of the corpus."""
RULE = {"kind": "quota", "score": COLUMN, "by": ["aspect"], "ratio": RATIO}
GOALS = {"duckdb": "≥ 4 × the best", "polars": "≥ 4 × the best", "polars by hand": "-"}
READS = {
    "normal": {**ONCE, "scores.aspect": 2},
    "ties": {**ONCE, "scores.aspect": 3, "scores.score": 3, "scores.pair_id": 3},
}
"""How often the stage reads each column of a shard. With ties the smallest strata take a second round: their ledgers
hold too few values to foresee the tie."""


def seats(sizes: dict[str, int]) -> dict[str, int]:
    """3/10 of each stratum by largest remainders, in whole numbers; a tie goes to the first by name."""
    k = sum(sizes.values()) * 3 // 10
    given = {name: size * k // sum(sizes.values()) for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(sizes[name] * k % sum(sizes.values())), name))
    for name in by_remainder[: k - sum(given.values())]:
        given[name] += 1
    return given


def duckdb_sides(files: Sequence[str], given: dict[str, int], file: str) -> dict[str, Side]:
    """row_number over each stratum; or a sort and a limit for each."""
    scores = f"read_parquet({list(files)})"
    ranked = "row_number() OVER (PARTITION BY aspect ORDER BY score DESC, pair_id)"
    limit = "CASE aspect " + " ".join(f"WHEN '{name}' THEN {count}" for name, count in given.items()) + " END"

    def qualify() -> None:
        copy(f"SELECT pair_id FROM {scores} QUALIFY {ranked} <= {limit}", file)

    def per_stratum() -> None:
        one = "(SELECT pair_id FROM {} WHERE aspect = '{}' ORDER BY score DESC, pair_id LIMIT {})"
        copy(" UNION ALL ".join(one.format(scores, *item) for item in given.items()), file)

    return {"window": qualify, "a limit per stratum": per_stratum}


def polars_sides(files: Sequence[str], given: dict[str, int], file: str) -> dict[str, Side]:
    """A sort, then a running number over each stratum; or a sort within each stratum."""
    import polars as pl

    scan = pl.scan_parquet(list(files)).select("score", "pair_id", pl.col("aspect").cast(pl.String))
    limit = pl.col("aspect").replace_strict(given, return_dtype=pl.Int64)
    number = pl.int_range(pl.len())

    def write(kept: pl.LazyFrame) -> None:
        kept.select("pair_id").collect().write_parquet(file, compression="uncompressed")

    def after_sort() -> None:
        write(scan.sort(["score", "pair_id"], descending=[True, False]).filter(number.over("aspect") < limit))

    def within() -> None:
        write(scan.filter(pl.struct(-pl.col("score"), "pair_id").rank("ordinal").over("aspect") <= limit))

    return {"sort, number over": after_sort, "rank over": within}


def by_hand_sides(files: Sequence[str], given: dict[str, int], sizes: dict[str, int], file: str) -> dict[str, Side]:
    """Columns in memory, a quantile per stratum, ties by pair_id: what a person could write instead of a window."""
    import polars as pl

    def thresholds() -> None:
        rows = pl.scan_parquet(list(files)).select("score", "aspect", "pair_id").collect()
        parts = []
        for name, count in given.items():
            inside = rows.filter(pl.col("aspect") == name)
            share = (sizes[name] - count + 0.5) / max(1, sizes[name] - 1)
            cut = inside["score"].quantile(share, "lower")
            above = inside.filter(pl.col("score") > cut)["pair_id"]
            ties = inside.filter(pl.col("score") == cut)["pair_id"]
            surplus = len(above) + len(ties) - count
            parts += [above, ties.sort()[: len(ties) - surplus] if surplus else ties]
        pl.DataFrame({"pair_id": pl.concat(parts)}).write_parquet(file, compression="uncompressed")

    return {"thresholds": thresholds}


def stratum_sizes(corpus: Corpus) -> dict[str, int]:
    """Rows of each aspect."""
    import polars as pl

    counted = pl.scan_parquet(corpus.files).group_by(pl.col("aspect").cast(pl.String)).len().collect()
    return dict(sorted(counted.iter_rows()))


def peers(corpus: Corpus, file: str) -> dict[str, dict[str, Side]]:
    """Every peer, by formulation."""
    sizes = stratum_sizes(corpus)
    given = seats(sizes)
    return {
        "duckdb": duckdb_sides(corpus.files, given, file),
        "polars": polars_sides(corpus.files, given, file),
        "polars by hand": by_hand_sides(corpus.files, given, sizes, file),
    }


def compare(shape: str, corpus: Corpus, repeats: int) -> list[dict[str, Any]]:
    """Lines of the table for one shape."""
    file = f"{corpus.folder}/peer.parquet"
    kept_KW = corpus.ids()[corpus.kept(corpus.select(RULE))]
    best = {name: fastest(kept_KW, sides, file) for name, sides in peers(corpus, file).items()}
    ours: dict[str, Side] = {"stage": lambda: corpus.select(RULE), "mechanism": lambda: corpus.locate(RULE)}
    times = alternate(ours | {name: side for name, (_, side) in best.items()}, repeats)
    return [
        row(f"{shape} / {what} / {name}", times[what], times[name], GOALS[name] if what == "stage" else "-")
        | {"peer": how}
        for what in ours
        for name, (how, _) in best.items()
    ]


def check(shape: str) -> None:
    """What CI asserts: the peers' set, and how often each column is read."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(folder, shape, 200_000, 25_000, aspects=ASPECTS)
        with counted_reads() as reads:
            report = corpus.select(RULE)
        kept_KW = corpus.ids()[corpus.kept(report)]
        file = f"{folder}/peer.parquet"
        for sides in peers(corpus, file).values():
            fastest(kept_KW, sides, file)
        per_shard = {name: count / len(corpus.shards) for name, count in reads.items()}
        if per_shard != READS[shape]:
            raise SystemExit(f"{shape}: columns read {per_shard} times a shard, expected {READS[shape]}")
        print(f"{shape}: {len(kept_KW):,} of 200,000, the peers' set; columns read {per_shard} times")


def claims_of(lines: list[dict[str, Any]], shape: str, num_rows: int) -> list[dict[str, Any]]:
    """The stage against the best peer, the mechanism and the thresholds by hand beside it."""
    found = []
    for what in ("stage", "mechanism"):
        mine = [one for one in lines if f" / {what} / " in one["case"]]
        best = min((one for one in mine if not one["case"].endswith("by hand")), key=lambda one: one["peer_s"])
        text = (
            f"{what}: top {RATIO:.0%} of {num_rows:,} scores ({shape}) in {len(ASPECTS)} strata, {best['ours_s']:.2f} s"
        )
        name = best["case"].split(" / ")[-1]
        found.append(claim(f"{text}; {name}: {best['peer']}", best["ratio"], "× the best peer", "≥ 4"))
        found.append(claim(f"{text}; thresholds by hand", mine[-1]["ratio"], "× Polars by hand", "≥ 1"))
    return found


def main() -> None:
    options = arguments(__doc__, rows=1e7, shard_rows=100_000, shapes="normal,ties")
    if options.quick:
        for shape in options.shapes.split(","):
            check(shape)
        return
    num_rows = int(options.rows)
    lines, claims = [], []
    with started_ray():
        for shape in options.shapes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                corpus = make_corpus(folder, shape, num_rows, options.shard_rows, aspects=ASPECTS)
                found = compare(shape, corpus, options.repeats)
            lines += found
            claims += claims_of(found, shape, num_rows)
    columns = ["case", "peer", "ours_s", "peer_s", "ratio", "goal", "spread"]
    finish("select_quota", options, lines, columns, claims, ["duckdb", "polars"], reads=READS)


if __name__ == "__main__":
    main()
