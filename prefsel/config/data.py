"""Where the corpus comes from, how its rows are read, and which of its prompts are kept out of selection."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from prefsel.config.options import Fraction, Name, Options

Path = Annotated[str, Field(pattern=r"^[^.\[\]]+(\[-?\d*\])*(\.[^.\[\]]+(\[-?\d*\])*)*$")]
"""`a`, `a.b`, `a[].b` or `a[0].b`."""


class FormatOptions(Options):
    """How rows with several completions become pairs."""

    aspects: Literal["assign", "all"] = "assign"
    """Which aspects label pairs where completions are rated by several. `assign` takes one aspect per prompt, chosen by
    a hash of the prompt, so that a reward model trained on one aspect never saw the texts of another's. `all` mines
    every aspect from every prompt; reward models then need `cross_fit`."""
    label: Literal["aspect", "overall", "mean"] = "aspect"
    """Which rating decides a pair: `aspect` is the rating of the pair's own aspect, `overall` the overall score of the
    row, `mean` the mean over the aspects that both completions are rated on."""
    relabel: bool = False
    """With `label: overall` or `label: mean`: keep the pairs that an aspect labels and let the other rating only decide
    which side is chosen (the baselines OVA and AVG). Without it every two completions are mined by the other rating."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Which pairs are made of K completions with scalar rewards (format `scored`): `best_worst` gives one, the best
    against the worst; `all` gives every two completions with different rewards."""

    aspect: str | None = None
    """The one aspect that labels pairs, where rows have several; None: as `aspects` says."""
    ignore: list[str] = []
    """Fields that may be left out although they change what the model saw, such as `system` or `images`. Without this
    a row with such a field that the format does not read is refused."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the shards of a source are named by: every option, those of later versions where they are used."""
        return self.model_dump(exclude={name for name in ("aspect", "ignore") if not getattr(self, name)})

    @model_validator(mode="after")
    def _turned_by_another(self) -> FormatOptions:
        if self.relabel and self.label == "aspect":
            raise ValueError("relabel: got True with label 'aspect'; valid: label overall or mean")
        return self


class Verdict(Options):
    """A field that says which of two responses is better."""

    field: Path
    """Where it stands."""
    first: list[str | int | float | bool] = []
    """Values that prefer the first response."""
    second: list[str | int | float | bool] = []
    """Values that prefer the second one."""
    tie: list[str | int | float | bool] = []
    """Values that prefer neither; such a row gives no pair and is counted."""
    sign: Literal["first", "second"] | None = None
    """Instead of values: a number, of which a positive one prefers this response, a negative one the other, and 0
    neither. Its size is the margin of the label."""
    zero: float = 0.0
    """With `sign`: the number that prefers neither; so do those of `tie`."""
    range: tuple[float, float] | None = None
    """With `sign`: the smallest and the largest number there can be; another one refuses the row."""
    aspect: str | None = None
    """What the two are compared by, where a row has several such fields."""

    @model_validator(mode="after")
    def _says_something(self) -> Verdict:
        if self.sign is None and not (self.first and self.second):
            raise ValueError("preference: needs the values of first and second, or sign")
        return self


class FieldMap(Options):
    """Which field of a row is what, where no format fits: the paths of its fields.

    A path is `field`, `field.inside`, `list[].inside` for every element of a list, or `list[0]` for one of them. A
    conversation may be text, a message, a list of messages (role and content, or from and value), or their JSON text.
    """

    prompt: Path | None = None
    """The prompt: the user's text, or a conversation. It may be left out where the responses are whole conversations,
    which then share it."""
    system: Path | None = None
    """A system message before the prompt; of empty text there is none."""
    history: Path | None = None
    """Earlier turns before the prompt: pairs of user and assistant, or messages."""
    input: Path | None = None
    """Text that follows the prompt's after a blank line, as in Alpaca's instruction and input."""
    tools: Path | None = None
    """Tools that the template is given, a list of objects or their JSON text."""
    chosen: Path | None = None
    """The better response, where the row has one of each: text, or messages that may repeat the prompt."""
    rejected: Path | None = None
    """The worse one."""
    responses: Path | list[Path] | None = None
    """Several responses: a list (`answers[].text`), or one field for each."""
    scores: Path | list[Path] | None = None
    """A number for each response, of which the larger is better."""
    ranks: Path | list[Path] | None = None
    """A place for each response, of which the smaller is better."""
    ratings: dict[str, Path | list[Path]] = {}
    """Further numbers for each response by name; they are kept beside it, and with `options.label: aspect` (and no
    scores, ranks or preference) they are the aspects that label pairs."""
    preference: Verdict | list[Verdict] | None = None
    """Which of exactly two responses is better."""
    aspect: Path | None = None
    """What the pair is labelled for, as a text of the row."""

    @model_validator(mode="after")
    def _two_sides(self) -> FieldMap:
        has_sides = self.chosen is not None or self.rejected is not None
        if has_sides == (self.responses is not None) or (has_sides and None in (self.chosen, self.rejected)):
            raise ValueError("map: needs chosen and rejected, or responses")
        labels = [name for name in ("scores", "ranks", "preference") if getattr(self, name) is not None]
        if self.responses is not None and len(labels) + bool(self.ratings and not labels) != 1:
            got = ", ".join(labels) or "nothing"
            raise ValueError(f"map: got {got} beside responses; valid: one of scores, ranks, preference")
        if has_sides and labels:
            raise ValueError(f"map: got {', '.join(labels)} beside chosen and rejected, which are labelled already")
        return self


OWN_NAMES = frozenset(
    {
        *("pair_id", "mirror_id", "prompt_id", "prompt", "chosen", "rejected", "source", "aspect", "label_margin"),
        *("score", "percentile", "stratum", "flipped", "dropped", "file", "row", "tools", "length_bin"),
    }
)
"""What columns of pairs are called already."""
OWN_BEGINNINGS = ("rm_", "logps_", "dlogps_", "num_tokens_", "ratings_", "score_", "percentile_", "kept_", "reason_")
OWN_ENDS = ("_chosen", "_rejected")


class Source(Options):
    """One named part of the corpus."""

    name: Name
    """Name of the source. It names folders of the workspace, and rules may use it as a stratum."""
    paths: list[str] = Field(min_length=1)
    """Where the rows are: files, folders, globs or URIs (`s3://`, `gs://`, `hf://datasets/…`), or
    `datasets:NAME[:CONFIG]/SPLIT`, which reads a data set of the Hugging Face hub. Relative paths start at the working
    directory."""
    format: str = "auto"
    """How a row is read: `auto` takes the format of the first row that looks like one; otherwise the name of a
    format."""
    map: FieldMap | None = None
    """Which field of a row is what, where no format fits; `format` is then left out."""
    options: FormatOptions = FormatOptions()
    """How a row with several completions becomes pairs."""
    carry: list[Path] = []
    """Fields of a row that go along with its pairs, such as `annotator`, `task` or `meta.language`: rules make strata
    of them (`by`), `reliability` groups, and datasets hold them as columns of text. Numbers become text; a field that
    is absent or empty is null, and a list or an object refuses the row. Another list reads the source anew."""
    role: Literal["train", "validation", "holdout", "exclude", "prompts"] = "train"
    """What the source is for. `train`: selected from. `holdout`: trainings are evaluated on it; it is never selected or
    trained on. `validation`: what influence is measured against, see `split.validation`; it is refused when it shares a
    prompt with what is selected from. `exclude`: its prompts are used nowhere. `prompts`: its prompts alone are read,
    for models to answer (`generate`, `selfplay`)."""

    @model_validator(mode="after")
    def _carried_have_other_names(self) -> Source:
        if len(set(self.carry)) < len(self.carry):
            raise ValueError(f"carry: names must differ: got {', '.join(self.carry)}")
        for name in self.carry:
            if name in OWN_NAMES or name.startswith(OWN_BEGINNINGS) or name.endswith(OWN_ENDS):
                raise ValueError(f"carry: got {name!r}, as a column of pairs is called already; valid: other fields")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_carry(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A source that carries nothing is written, and so its runs are named, as if there were no such option."""
        written: dict[str, Any] = dump(self)
        if not self.carry:
            written.pop("carry", None)
        return written


class Ingest(Options):
    """Limits of ingest."""

    rows_per_shard: int = Field(4096, ge=1)
    """Input rows in one shard. A shard is the unit of work, of retry and of resume: smaller ones spread over more
    actors and lose less when a node dies, larger ones cost fewer files."""
    max_row_mib: float = Field(16.0, gt=0)
    """Largest row in MiB; a larger one is quarantined as `row_too_large`."""
    max_quarantine_fraction: float = Field(0.05, ge=0, le=1)
    """The run fails when more than this share of all rows is quarantined, because a corpus that is mostly unreadable is
    usually read in the wrong format."""


class Split(Options):
    """Fractions of the prompts, by hash of prompt_id, that are kept out of selection."""

    holdout: Fraction = 0.0
    """Share of the prompts that trainings are evaluated on. They are never selected, never part of a statistic and
    never trained on."""
    proxy: Fraction = 0.0
    """Share of the prompts that train the models made on the spot (`scratch_policy`, `scratch_reward`). They are
    dropped from selection, so that no model scores what it was trained on."""
    validation: Fraction = 0.0
    """Share of the prompts that selectors aim at: they give tangents their gradient and θ_val its training. They are
    never selected, and no training is evaluated on them, so the evaluation is independent of the selection."""

    @model_validator(mode="after")
    def _something_left(self) -> Split:
        if (total := self.holdout + self.proxy + self.validation) >= 1:
            raise ValueError(f"holdout + proxy + validation: got {total}; must stay below 1")
        return self


class Duplicates(Options):
    """The same pair, or its opposite, in several places of the corpus."""

    contradictions: Literal["drop", "keep"] = "drop"
    """What happens to a pair that stands in the corpus with both labels: `drop` leaves both out, as one of them is
    wrong; `keep` keeps both."""
