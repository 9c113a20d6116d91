from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from prefsel.config import FormatOptions
from prefsel.ingest.formats import FORMATS, detect
from prefsel.world.gold import ASPECTS, aspects
from prefsel.world.labels import corpus_row, label_pair, part_of, proxy_pairs, rate, sample_prompts, write_jsonl

PROMPT = "tell me about apple , lamp and river"
# coverage, sobriety and so on in standard deviations:
GOOD = "hello . the apple is red . the lamp is white . thanks ."  # -0.30, 1.27, 1.18, 0.37
RUDE = "the apple is blue ."  # -1.44, -1.34, -1.19, 1.54


def test_parts_are_disjoint_and_shared_out_as_documented():
    prompts = {part: sample_prompts(np.random.default_rng(0), 300, part) for part in ("corpus", "proxy", "heldout")}
    assert all(len(set(found)) == 300 for found in prompts.values())
    assert all(part_of(prompt) == part for part, found in prompts.items() for prompt in found)
    counts = Counter(part_of(f"prompt {number}") for number in range(5000))
    assert counts["corpus"] / 5000 == pytest.approx(0.3, abs=0.03)
    assert counts["proxy"] / 5000 == pytest.approx(0.6, abs=0.03)


def test_ratings_without_noise_are_rounded_aspects():
    good, rude = rate(np.random.default_rng(0), PROMPT, [GOOD, RUDE], noise=0.0, slip=0.0)
    # 3 + z, rounded
    assert good == {"coverage": 3, "sobriety": 4, "courtesy": 4, "conciseness": 3}
    assert rude == {"coverage": 2, "sobriety": 2, "courtesy": 2, "conciseness": 5}


def test_a_slip_reverses_the_ratings_of_all_responses():
    good, rude = rate(np.random.default_rng(0), PROMPT, [GOOD, RUDE], noise=0.0, slip=1.0)
    assert good == {"coverage": 3, "sobriety": 2, "courtesy": 2, "conciseness": 3}
    assert rude == {"coverage": 4, "sobriety": 4, "courtesy": 4, "conciseness": 1}


def test_ratings_slip_and_scatter_as_often_as_documented():
    rng = np.random.default_rng(1)
    rows = [rate(rng, PROMPT, [GOOD, RUDE]) for _ in range(2000)]
    differences = np.array([[good[name] - rude[name] for name in ASPECTS] for good, rude in rows])
    # Good and rude lie 2.6 standard deviations apart in sobriety: noise alone hardly ever turns that around.
    assert (differences[:, ASPECTS.index("sobriety")] < 0).mean() == pytest.approx(0.1, abs=0.025)
    # Two independent errors of 0.5: the difference scatters by about 0.7 within the rows that did not slip.
    kept = differences[:, 1][differences[:, 1] > 0]
    assert kept.std() == pytest.approx(0.75, abs=0.15)
    assert all(1 <= value <= 5 for row in rows for ratings in row for value in ratings.values())


def test_labels_are_wrong_exactly_where_they_slipped_and_that_is_a_tenth():
    pairs = proxy_pairs(np.random.default_rng(2), 2000)
    for pair in pairs:
        difference = aspects(pair.prompt, pair.chosen)[pair.aspect] - aspects(pair.prompt, pair.rejected)[pair.aspect]
        assert difference != 0
        assert (difference < 0) == pair.has_slipped
        assert part_of(pair.prompt) == "proxy"
    assert np.mean([pair.has_slipped for pair in pairs]) == pytest.approx(0.1, abs=0.02)
    assert min(Counter(pair.aspect for pair in pairs).values()) > 300


def test_a_tie_gets_no_label():
    assert all(label_pair(np.random.default_rng(seed), PROMPT, GOOD, GOOD) is None for seed in range(20))


def test_the_same_seed_labels_the_same():
    assert proxy_pairs(np.random.default_rng(3), 20) == proxy_pairs(np.random.default_rng(3), 20)
    assert proxy_pairs(np.random.default_rng(3), 20) != proxy_pairs(np.random.default_rng(4), 20)


def test_ingest_reads_a_corpus_row_and_mines_its_pairs(tmp_path):
    responses = [GOOD, RUDE, "hi . the apple is red .", "the lamp is steep so on and on ."]
    row = corpus_row(np.random.default_rng(0), PROMPT, responses)
    write_jsonl(tmp_path / "corpus.jsonl", [row])
    (read,) = (json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines())
    assert read == row
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
    assert detect(read) == "ultrafeedback"
    example = FORMATS["ultrafeedback"](read, FormatOptions(aspects="all"))
    assert len(example.preferences) + example.ties == 6 * len(ASPECTS)
    for preference in example.preferences:
        ratings = [row["completions"][index]["annotations"][preference.aspect]["Rating"] for index in range(4)]
        assert int(ratings[preference.chosen]) > int(ratings[preference.rejected])
