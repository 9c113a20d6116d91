"""`prefsel env` as a bug report shows it."""

from __future__ import annotations

import importlib.metadata

import pytest

import prefsel
from prefsel.environment import environment, lines


def test_versions_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = environment()
    assert found["prefsel"].startswith(prefsel.__version__)
    for package in ("ray", "torch", "transformers", "datasets", "deepspeed", "pyarrow"):
        assert found[package] == importlib.metadata.version(package)
    assert "GiB" in found["memory"]
    assert found["ray address"].startswith("a run starts a Ray of its own")
    assert len(list(lines())) == len(found)


def test_no_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://user:S3CRET@head:10001")
    monkeypatch.setenv("HF_TOKEN", "hf_S3CRET")
    told = "\n".join(lines())
    assert "S3CRET" not in told
    assert "RAY_ADDRESS is ray://***@head:10001: a run joins that cluster" in told
