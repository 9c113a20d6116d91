"""The policy of an actor, loaded beside its first shard: what fails is told when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from prefsel.config import GenerationOptions
from prefsel.generate.shard import PolicyAnswers
from prefsel.plugins.registry import load as load_plugins
from prefsel.score.job import local
from prefsel.workspace.storage import Storage


def load_policy(
    policy: Mapping[str, Any], options: GenerationOptions, storage: Storage, plugins: Sequence[str]
) -> Future[PolicyAnswers]:
    """Begin to load a policy, and return at once.

    Args:
        policy: Loading arguments of the model.
        options: How it is asked.
        storage: The workspace, in which a model that was made here lies.
        plugins: Modules to load before it.
    """
    loader = ThreadPoolExecutor(1, thread_name_prefix="load")

    def load() -> PolicyAnswers:
        load_plugins(plugins)
        return PolicyAnswers(policy=local(policy, storage), options=options)

    found = loader.submit(load)
    loader.shutdown(wait=False)
    return found
