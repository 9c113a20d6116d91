"""A policy, loaded by transformers, that answers shards of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from prefsel.config import GenerationOptions
from prefsel.generate.answered import Answered, Refusal, Said, answered, prompt_tokens
from prefsel.generate.draw import Sampling
from prefsel.generate.engine import Generator
from prefsel.models.chat import Encoder
from prefsel.models.loading import check_vocabulary, default_device, load_causal, load_tokenizer
from prefsel.models.writer import Messages


class PolicyAnswers:
    """A policy, loaded, that answers shards of prompts."""

    def __init__(self, *, policy: dict[str, Any], options: GenerationOptions, device: Any = None) -> None:
        """Load the policy.

        Args:
            policy: Arguments of `load_causal`, and `path`, `template`, `max_length`.
            options: How it answers.
            device: Where it runs; None: a GPU where there is one.

        Raises:
            UserError: it cannot be loaded, or has no template.
        """
        policy = dict(policy)
        path, template = policy.pop("path"), policy.pop("template", "auto")
        self.max_length: int = policy.pop("max_length")
        policy.pop("truncation", None)
        more = {key: policy[key] for key in ("revision", "trust_remote_code")}
        tokenizer = load_tokenizer(path, **more)
        self.encoder = Encoder(tokenizer, template)
        model = load_causal(path, **({"device": default_device(device)} | policy))
        check_vocabulary(tokenizer, model, path=path)
        ending = self.encoder.traits.ending
        self.generator = Generator(model, tokenizer, token_budget=options.token_budget, ending=ending)
        self.options = options

    def answer(self, prompts: pa.Table, *, label: str) -> Answered:
        """Ask every prompt for its responses, and look at each of them.

        Args:
            prompts: Schema `prompts_schema`.
            label: Of the policy, for who wrote what.
        """
        options, before = self.options, Counter(self.generator.counters)
        rows = prompts.to_pylist()
        keys = [int.from_bytes(row["prompt_id"][:8], "big") for row in rows]
        said = self.ask([row["prompt"] for row in rows], keys, samples=options.samples)
        spent = Counter(self.generator.counters)
        spent.subtract(before)
        return answered(prompts, said, options, label=label, spent=spent)

    def ask(
        self, prompts: Sequence[Messages], keys: Sequence[int], *, samples: int, first_sample: int = 0
    ) -> list[Said]:
        """Responses to conversations, or why the policy cannot be asked.

        Args:
            prompts: Messages, each of which ends where the policy is to answer.
            keys: What the random numbers of each follow from.
            samples: Responses to each.
            first_sample: The number of the first one.
        """
        options = self.options
        limits = {"max_length": self.max_length, "max_new_tokens": options.max_new_tokens}
        found = [prompt_tokens(self.encoder, prompt, **limits) for prompt in prompts]
        places = [place for place, one in enumerate(found) if not isinstance(one, Refusal)]
        responses = self.generator.generate(
            [one for one in found if not isinstance(one, Refusal)],
            [keys[place] for place in places],
            samples,
            Sampling(options.temperature, options.top_p, options.max_new_tokens, options.seed),
            first_sample=first_sample,
        )
        by_place = dict(zip(places, responses))
        return [one if isinstance(one, Refusal) else by_place[place] for place, one in enumerate(found)]
