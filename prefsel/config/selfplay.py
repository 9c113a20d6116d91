"""Self-play: a policy makes its own preference data."""

from __future__ import annotations

from pydantic import Field, field_validator

from prefsel.config.options import Options

STRATEGIES = ("breadth", "deepen", "constraints", "concretise", "reasoning")
"""The strategies that come with this package, each a file of `prefsel/selfplay/strategies/`."""
FILE_ENDINGS = (".yaml", ".yml")


class Evolve(Options):
    """New prompts from old ones: the policy rewrites the prompts of the best pairs, each once by every strategy."""

    share: float = Field(0.25, gt=0, le=1)
    """Share of the prompts that are rewritten, those whose pairs score best by the metric of the round."""
    strategies: list[str] = Field([*STRATEGIES], min_length=1)
    """How prompts are rewritten: `breadth` asks for a new prompt beside the old one, the others for a harder one
    (`deepen`, `constraints`, `concretise`, `reasoning`). The path of a YAML file with `name`, `kind` (`breadth` or
    `depth`) and `template` (with `{prompt}` where the old prompt goes) is one of your own; a relative path starts at
    the working directory."""
    length_factor: float | None = Field(5.0, gt=1, allow_inf_nan=False)
    """A new prompt must be shorter than so many times the old one, and the old one shorter than so many times the new
    one, in characters; null sets no limit."""
    max_new_tokens: int = Field(1024, ge=1)
    """Longest new prompt in tokens."""
    temperature: float = Field(0.8, ge=0)
    """Temperature of the sampling; 0 takes the likeliest token."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of the sampling: tokens are drawn from the most likely ones that make up this probability; 1 keeps
    all."""

    @field_validator("strategies")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in STRATEGIES and not name.endswith(FILE_ENDINGS):
                raise ValueError(f"got {name!r}; valid: {', '.join(STRATEGIES)}, or the path of a .yaml file")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"got {', '.join(twice)} twice; valid: each once")
        return names
