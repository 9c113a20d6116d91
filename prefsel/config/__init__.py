"""The configuration of a run: frozen records by subject, every key documented, nothing unknown accepted.

data         sources, ingest, splits             models       pretrained, or made on the spot
scorers      what makes columns                  tangents     directions of derivatives
selections   metrics, and subsets by rules       training     policies and reward models
run          all of it                           lookup       what records ask of each other
file         YAML, `base:` and `--set` → a run

A record knows its label, the columns it makes, the models it needs, and checks that its neighbours fit. Rules and
metric parameters stand here as plain tables; `rules.py` and `metrics/*.py` define and check them.
"""

from prefsel.config.data import Duplicates, FieldMap, FormatOptions, Ingest, Source, Split, Verdict
from prefsel.config.evaluation import Evaluation, PairwiseFunction
from prefsel.config.generation import Generation, GenerationOptions, PromptChoice
from prefsel.config.models import Model, PretrainedModel, ScratchModel, ScratchPolicy, ScratchReward, ScratchTokenizer
from prefsel.config.options import Dtype, Fraction, Name, Options
from prefsel.config.rounds import EarlyStop, RoundMetric, RoundTraining, SelfPlay
from prefsel.config.run import Config, RayOptions, ReportOptions
from prefsel.config.scorers import (
    CausalLogps,
    DirectionalLogps,
    GeneratedReward,
    Imported,
    ModelDivergence,
    ModelScorer,
    PairGradients,
    Pool,
    PooledScorer,
    RewardFunction,
    RewardModel,
    Scorer,
)
from prefsel.config.selections import MetricSpec, Selection
from prefsel.config.tangents import Tangent
from prefsel.config.training import (
    PARTS,
    CrossFit,
    DpoOptions,
    Lora,
    Optimization,
    Placement,
    RewardOptions,
    TrainDpo,
    TrainedModel,
    Training,
    TrainReward,
)

__all__ = [
    "PARTS",
    "CausalLogps",
    "Config",
    "CrossFit",
    "DirectionalLogps",
    "DpoOptions",
    "Dtype",
    "Duplicates",
    "EarlyStop",
    "Evaluation",
    "FieldMap",
    "FormatOptions",
    "Fraction",
    "GeneratedReward",
    "Generation",
    "GenerationOptions",
    "Imported",
    "Ingest",
    "Lora",
    "MetricSpec",
    "Model",
    "ModelDivergence",
    "ModelScorer",
    "Name",
    "Optimization",
    "Options",
    "PairGradients",
    "PairwiseFunction",
    "Placement",
    "Pool",
    "PooledScorer",
    "PretrainedModel",
    "PromptChoice",
    "RayOptions",
    "ReportOptions",
    "RewardFunction",
    "RewardModel",
    "RewardOptions",
    "RoundMetric",
    "RoundTraining",
    "Scorer",
    "ScratchModel",
    "ScratchPolicy",
    "ScratchReward",
    "ScratchTokenizer",
    "Selection",
    "SelfPlay",
    "Source",
    "Split",
    "Tangent",
    "TrainDpo",
    "TrainReward",
    "TrainedModel",
    "Training",
    "Verdict",
]
