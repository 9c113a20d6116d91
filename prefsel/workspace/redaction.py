"""Texts without credentials."""

from __future__ import annotations

import re


def redact(text: str) -> str:
    """`text` without credentials: in URIs (`s3://KEY:SECRET@bucket`), in `secret`-like query fields, key ids of AWS."""
    # After a colon up to the last @, because secrets hold slashes; the @ of an artifact's name stands after a slash.
    text = re.sub(r"(\w+://)([^\s'\"/:]*:[^\s'\"]*|[^\s'\"/]*)@", r"\1***@", text)
    text = re.sub(r"\b(AKIA|ASIA)[0-9A-Z]{12,}", "***", text)  # a store names the key that it refuses
    return re.sub(r"((?:secret|token|password|access_key)[\w-]*=)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)
