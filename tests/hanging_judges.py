"""A judge that hangs the first time it is asked; workers import it from this folder."""

from __future__ import annotations

import time
from pathlib import Path


def hangs_once(prompts, answers):
    """Count letters, except where the file that every prompt begins with is not there yet: then never return."""
    try:
        Path(prompts[0].split()[0]).touch(exist_ok=False)
    except FileExistsError:
        return [float(len(answer)) for answer in answers]
    time.sleep(3600)
