"""Packages of other people, as files: an installed one with entry points, and a plain module."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

METRIC = """
    from prefsel.config import Options
    from prefsel.metrics import Metric, Need, Statistic


    class Centred(Options):
        rm: str
        factor: float = 1.0


    def columns(params):
        return (f"rm_{params.rm}_chosen", f"rm_{params.rm}_rejected")


    def margin(columns, params):
        return columns[f"rm_{params.rm}_chosen"] - columns[f"rm_{params.rm}_rejected"]


    def moments(columns, params, fitted):
        return {"margin": Need(Statistic("moments", "the margin"), margin(columns, params))}


    def score(columns, params, fitted):
        return params.factor * (margin(columns, params) - fitted["margin"]["mean"])


    METRIC = Metric("centred", Centred, columns, score, "a paper of others", rounds=lambda params: (moments,))
"""
"""The margin of a reward model, less its mean over the corpus."""

FORMAT_AND_LOSS = """
    import torch.nn.functional as F

    from prefsel.ingest.example import completion_of, field, number, prompt_of
    from prefsel.ingest.formats import Completion, Example, Preference
    from prefsel.plugins import register_format, register_loss
    from prefsel.config.losses import Loss
    from prefsel.train.losses import reward_margins


    def adapt(row, options):
        sides = [(completion_of(field(row, side), side), number(field(row, side + "_points"), side)) for side in "ab"]
        first = int(sides[1][1] > sides[0][1])
        completions = [Completion(messages, {"score": points}) for messages, points in sides]
        prompt = prompt_of(field(row, "question"), "question")
        return Example(prompt, completions, [Preference(first, 1 - first, None, None)])


    def doubled(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta, smoothing):
        margins = reward_margins(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
        return 2.0 * F.softplus(-margins) + smoothing


    register_format("points", adapt)
    register_loss("doubled", Loss(doubled, options={"smoothing": "label_smoothing"}))
"""


def write(folder: Path, name: str, code: str) -> Path:
    """A module file."""
    file = folder / f"{name}.py"
    file.write_text(textwrap.dedent(code).lstrip())
    return file


def install(folder: Path, package: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
    """What an installer leaves of a package besides its code: metadata with entry points, by group."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "\n".join(map(" = ".join, named.items())) for group, named in entry_points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
