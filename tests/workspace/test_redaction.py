"""Credentials go, everything that tells where something lies stays."""

import pytest

from prefsel.display import redact


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("s3://key:sec/ret@bucket/w", "s3://***@bucket/w"),
        ("s3://key:s@e/cr@bucket/w", "s3://***@bucket/w"),
        ("https://token@host/a", "https://***@host/a"),
        ("s3://bucket/w/scores/margin@3a425e02/a", "s3://bucket/w/scores/margin@3a425e02/a"),
        ("hf://datasets/org/set@main/a.parquet", "hf://datasets/org/set@main/a.parquet"),
        ("no user AKIAIOSFODNN7EXAMPLE here", "no user *** here"),
        ("s3://b/w?secret_key=abc&region=x", "s3://b/w?secret_key=***&region=x"),
    ],
)
def test_redact(text: str, told: str) -> None:
    assert redact(text) == told
