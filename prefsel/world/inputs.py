"""The inputs of a demonstration, made from nothing but a seed: a rated corpus and the two models that score it.

    grammar ─┬► conversations ─► policy ──► four responses per corpus prompt ─► noisy ratings ─► corpus.jsonl
             ├► fresh aspect-labelled pairs ─► reward model                     (policy and reward model in parallel)
             └► held-out prompts ─► heldout.jsonl

Everything is skipped that is already there for the same parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefsel.generate.sample import sample
from prefsel.models.loading import no_bars
from prefsel.scratch.models import RewardPair, one_thread, save, train_policy, train_reward, train_tokenizer
from prefsel.world.gold import ASPECTS, gold, raw_aspects
from prefsel.world.grammar import sample_response, sample_style, vocabulary
from prefsel.world.labels import corpus_row, proxy_pairs, sample_prompts, write_jsonl
from prefsel.world.pieces import OnProgress, Parameters, Piece, known, make, make_side_by_side

OVERALL: Final = "overall"
"""Name of the reward model's head that every pair trains; the others are the aspects."""
MAX_NEW_TOKENS: Final = 64
"""Words of a response at most: the grammar's longest has about 60."""
VERSION: Final = 2
"""Raised when the same parameters would make something else."""

# Independent streams of random numbers of one seed.
_TEXT, _PROXY, _CORPUS, _HELDOUT = range(4)


@dataclass(frozen=True)
class Sizes:
    """How much is made; measured so that all of it takes about a minute on two free cores."""

    num_prompts: int = 1200
    """Corpus rows."""
    num_responses: int = 4
    """Responses per corpus row: six pairs, of which about a quarter tie."""
    num_conversations: int = 24_000
    """What the policy is tuned on."""
    policy_steps: int = 2000
    num_proxy_labels: int = 12_000
    """Aspect labels the reward model costs."""
    reward_steps: int = 400
    num_heldout: int = 512

    def scaled(self, scale: float) -> Sizes:
        """The same with every number but `num_responses` multiplied, and at least 8."""
        numbers = {name: max(8, round(scale * number)) for name, number in asdict(self).items()}
        return Sizes(**{**numbers, "num_responses": self.num_responses})


@dataclass(frozen=True)
class DemoInputs:
    """What `make_inputs` made."""

    corpus: Path
    """JSONL in UltraFeedback's shape, ratings of four aspects."""
    policy: Path
    """Hugging Face folder; it also wrote the corpus's responses, so it is the reference."""
    reward_model: Path
    """Hugging Face folder; heads: the four aspects and `overall`."""
    heldout: Path
    """JSONL of `{"prompt"}`: for `evaluate_gold`."""
    proxies: Path
    """JSONL of the labelled pairs the reward model was made from."""
    num_proxy_labels: int
    reward_accuracy: dict[str, float]
    """By head, on held-out labels with their slips."""
    seconds: dict[str, float]
    """What each piece took when it was made."""


def make_inputs(
    directory: str | Path, *, seed: int, scale: float = 1.0, on_progress: OnProgress | None = None
) -> DemoInputs:
    """Make the demonstration's inputs, on two processes of one thread each.

    Args:
        directory: Where they go; created when missing.
        seed: Of the world, the models and the labels.
        scale: Multiplies all sizes; 1 is the demonstration, a hundredth is for tests.
        on_progress: Told about every piece.

    Returns:
        Where everything is, what its labels cost and how good the reward model became.
    """
    home = Path(directory)
    home.mkdir(parents=True, exist_ok=True)
    sizes = Sizes().scaled(scale) if scale != 1.0 else Sizes()
    parameters = {"seed": seed, "version": VERSION, **asdict(sizes)}
    report = on_progress or (lambda task, done, total: None)
    missing = [piece for piece in (POLICY, REWARD) if known(home, piece, parameters) is None]
    if missing:
        make_side_by_side(home, missing, parameters, report)
    if known(home, CORPUS, parameters) is None:
        make(home, CORPUS, parameters, report)
    facts = {piece.name: known(home, piece, parameters) or {} for piece in (POLICY, REWARD, CORPUS)}
    return DemoInputs(
        corpus=home / "corpus.jsonl",
        policy=home / "policy",
        reward_model=home / "reward",
        heldout=home / "heldout.jsonl",
        proxies=home / "proxies.jsonl",
        num_proxy_labels=sizes.num_proxy_labels,
        reward_accuracy=facts["reward"]["accuracy"],
        seconds={name: fact["seconds"] for name, fact in facts.items()},
    )


@dataclass(frozen=True)
class GoldScore:
    """The gold reward of a policy's responses to some prompts."""

    mean: float
    sem: float
    """Standard error of the mean over prompts."""
    mean_length: float
    """In words."""
    aspects: dict[str, float]
    """Means in their own units, see `gold.raw_aspects`."""
    per_prompt: tuple[float, ...]
    """In the order of the prompts, for paired differences."""


def evaluate_gold(
    model_dir: str | Path,
    prompts: Iterable[str],
    *,
    seed: int,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> GoldScore:
    """Sample one response per prompt from a saved policy and score it with gold.

    Args:
        model_dir: A Hugging Face folder with model and tokenizer.
        prompts: At least two.
        seed: Of the sampling; the same seed draws with the same random numbers for every policy.
        temperature: 1 samples as trained, 0 takes the likeliest words.
        max_new_tokens: Longer responses are cut.
    """
    asked = list(prompts)
    model, tokenizer = _load(model_dir)
    with one_thread():
        responses = sample(
            model,
            tokenizer,
            asked,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
    golds = np.array([gold(prompt, response) for prompt, response in zip(asked, responses)])
    raw = [raw_aspects(prompt, response) for prompt, response in zip(asked, responses)]
    return GoldScore(
        mean=float(golds.mean()),
        sem=float(golds.std(ddof=1) / np.sqrt(len(golds))),
        mean_length=float(np.mean([len(response.split()) for response in responses])),
        aspects={name: float(np.mean([row[name] for row in raw])) for name in ASPECTS},
        per_prompt=tuple(golds.tolist()),
    )


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a held-out file."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


# ------------------------------------------------------------------------------------------------------- pieces


def _make_policy(home: Path, parameters: Parameters, report: OnProgress) -> dict[str, Any]:
    rng = np.random.default_rng([parameters["seed"], _TEXT])
    prompts = [sample_prompts(rng, 1, "proxy")[0] for _ in range(parameters["num_conversations"])]
    policy = train_policy(
        tokenizer := _tokenizer(),
        [_conversation(prompt, sample_response(rng, prompt, sample_style(rng))) for prompt in prompts],
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        steps=parameters["policy_steps"],
        batch_tokens=1024,
        lr=6e-3,
        seed=parameters["seed"],
        max_length=128,
        on_step=lambda step, total, loss: report("policy", step, total),
    )
    save(policy, tokenizer, home / "policy")
    return {}


def _make_reward(home: Path, parameters: Parameters, report: OnProgress) -> dict[str, Any]:
    pairs = proxy_pairs(np.random.default_rng([parameters["seed"], _PROXY]), parameters["num_proxy_labels"])
    write_jsonl(home / "proxies.jsonl", pairs)
    model, accuracy = train_reward(
        tokenizer := _tokenizer(),
        [
            RewardPair(_conversation(pair.prompt, pair.chosen), _conversation(pair.prompt, pair.rejected), pair.aspect)
            for pair in pairs
        ],
        heads=ASPECTS,
        union_head=OVERALL,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        steps=parameters["reward_steps"],
        batch_tokens=3072,
        lr=4e-3,
        seed=parameters["seed"],
        max_length=128,
        holdout=0.05,
        on_step=lambda step, total, loss: report("reward model", step, total),
    )
    save(model, tokenizer, home / "reward")
    return {"accuracy": accuracy}


def _make_corpus(home: Path, parameters: Parameters, report: OnProgress) -> dict[str, Any]:
    rng = np.random.default_rng([parameters["seed"], _CORPUS])
    prompts = sample_prompts(rng, parameters["num_prompts"], "corpus")
    heldout = sample_prompts(
        np.random.default_rng([parameters["seed"], _HELDOUT]), parameters["num_heldout"], "heldout"
    )
    write_jsonl(home / "heldout.jsonl", ({"prompt": prompt} for prompt in heldout))
    model, tokenizer = _load(home / "policy")
    rows, k = [], parameters["num_responses"]
    for start in range(0, len(prompts), 100):
        window = prompts[start : start + 100]
        with one_thread():
            responses = sample(
                model,
                tokenizer,
                [prompt for prompt in window for _ in range(k)],
                max_new_tokens=MAX_NEW_TOKENS,
                seed=int(rng.integers(2**31)),
            )
        rows += [corpus_row(rng, prompt, responses[k * n : k * n + k]) for n, prompt in enumerate(window)]
        report("corpus", len(rows), len(prompts))
    write_jsonl(home / "corpus.jsonl", rows)
    return {}


POLICY: Final = Piece("policy", "policy/model.safetensors", _make_policy)
REWARD: Final = Piece("reward", "reward/model.safetensors", _make_reward)
CORPUS: Final = Piece("corpus", "corpus.jsonl", _make_corpus)


def _load(folder: str | Path) -> tuple[Any, Any]:
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)  # nosec B615 # a folder
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)  # nosec B615 # a folder


def _tokenizer() -> Any:
    return train_tokenizer([" ".join(vocabulary())], kind="word", vocab_size=256)


def _conversation(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
