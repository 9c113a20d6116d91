"""Adapters of peft: found in a folder or on a hub, put on their base model, and merged into it in memory.

path ─ adapter_config.json? ─ no ──▶ full weights, as ever
                └─ yes ─▶ Adapter: own files, base model ─▶ base loaded ─▶ merged: a plain model of transformers
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils.hub import cached_file

from prefsel.errors import UserError
from prefsel.models.plausible import json_table
from prefsel.workspace.places import checked_place

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TASKS = {"policy": ("CAUSAL_LM", None), "reward model": ("SEQ_CLS", None)}
"""What an adapter may say that it was trained for, to serve as either."""
MERGEABLE = ("LORA", "LOHA", "LOKR", "IA3", "OFT")
"""Kinds whose merged weights are tested against peft's own forward; prompts and prefixes have no place in weights."""
HEADS = (
    *("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight"),
    "logits_proj.weight",
)
"""How the last tensor of a classifier's head is called: in decoders, BERT, RoBERTa, BART and XLNet."""
_INSIDE = "base_model.model."
"""Before the name of every tensor in an adapter's file."""


@dataclass(frozen=True)
class Adapter:
    """An adapter and the model it belongs to, both found."""

    path: str
    """Directory or hub id of the adapter itself."""
    revision: str | None
    """Of a hub id: branch, tag or commit; None: main."""
    base: str
    """Directory (absolute) or hub id of the full weights."""
    base_revision: str | None
    settings: Mapping[str, Any]
    """Its `adapter_config.json`."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"model {self.path}: it is a {self.settings.get('peft_type', 'peft')} adapter of {self.base!r}"

    def folder(self) -> Path:
        """Where configuration and weights lie on this machine; a hub's are fetched.

        Raises:
            UserError: There are no weights that can be read.
        """
        if Path(self.path).is_dir():
            return Path(self.path)
        found = _hub_file(self.path, WEIGHTS, self.revision)
        if found is None:
            raise UserError(f"{self.name}, but its repository has no {WEIGHTS}, or cannot be reached")
        _hub_file(self.path, CONFIG, self.revision)
        return Path(found).parent

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of its file by name, `base_model.model.` left out."""
        try:
            with safe_open(self.folder() / WEIGHTS, "pt") as file:
                names = list(file.keys())  # it is no dictionary
                return {name.removeprefix(_INSIDE): tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise UserError(f"{self.name}, and its {WEIGHTS} cannot be read: {error}") from error

    def num_labels(self) -> int | None:
        """Outputs of the classifier's head that it brings along; None: it brings none."""
        heads = [shape for name, shape in self.shapes().items() if name.endswith(HEADS)]
        return heads[0][0] if heads else None

    def has_tokenizer(self, files: tuple[str, ...]) -> bool:
        """Whether it has one of the files that make a tokenizer, and need not take its base's."""
        if Path(self.path).is_dir():
            return any((Path(self.path) / name).is_file() for name in files)
        return any(_hub_file(self.path, name, self.revision) for name in files)

    def pinned(self, commit: str | None, base_commit: str | None) -> str:
        """A `revision` under which `find_adapter` finds exactly these two, whatever the hub says by then."""
        return f"{commit or ''}+{self.base}@{base_commit or ''}"


def find_adapter(path: str, revision: str | None = None) -> Adapter | None:
    """The adapter that lies at `path`, with its base; None where there are full weights or nothing.

    Args:
        path: Directory or hub id.
        revision: Of a hub id; or `<revision>+<base>@<revision of the base>`, which names both, either may be empty.

    Raises:
        UserError: It is an adapter that cannot be merged, or whose base is not named, not there, or no full model.
    """
    checked_place(path, "model")
    own, pinned, rest = (revision or "").partition("+")
    file = _config_file(path, own or None)
    if file is None:
        return None
    settings = json_table(file, f"model {path}")
    named = settings.get("base_model_name_or_path")
    if not pinned and not (isinstance(named, str) and named):
        raise UserError(
            f"model {path}: it is an adapter whose {CONFIG} names no base model; write its directory or hub id into "
            "base_model_name_or_path, or merge the adapter"
        )
    base, _, base_revision = (
        rest.rpartition("@") if pinned else (_located(str(named), path), "", settings.get("revision"))
    )
    adapter = Adapter(path, own or None, base, base_revision or None, settings)
    _check(adapter)
    return adapter


def merge(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The base model with the adapter in its weights: in fp32, rounded once to the dtype each weight has.

    Args:
        model: The loaded base, changed in place.
        adapter: Its adapter, loaded here.

    Raises:
        UserError: The adapter does not fit the base, lacks tensors, or is of a kind that cannot be merged.
    """
    from peft import PeftConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    folder, shapes = str(adapter.folder()), adapter.shapes()
    _resize_vocabulary(model, adapter, shapes)
    try:
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = True
        put_on: Any = get_peft_model(model, config)
        loaded = put_on.load_adapter(folder, "default", torch_device="cpu")
        to_save = [name for name in config.modules_to_save or () if any(_is_in(name, one) for one in _modules(model))]
        missing = [*loaded.missing_keys, *(name for name in to_save if not any(_is_in(name, one) for one in shapes))]
        unknown = [name for name in loaded.unexpected_keys if not _is_copy(name, shapes)]
        if missing or unknown:
            what, names = ("lacks", missing) if missing else ("has, unknown to the base,", unknown)
            raise UserError(f"{adapter.name}, and does not fit it: it {what} {len(names)} tensors: {names[:3]}")
        layers = [layer for layer in put_on.modules() if isinstance(layer, BaseTunerLayer)]
        _take_apart(model, [layer.get_base_layer() for layer in layers])
        for layer in layers:
            _merge_in_fp32(layer)
        merged: Any = put_on.merge_and_unload()
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter.name}, which it cannot be merged into: {reason}") from error
    _untie(merged)
    if hasattr(merged, "peft_config"):  # peft leaves it on the model, where it means that adapters are still in place
        del merged.peft_config
    merged.name_or_path = adapter.path
    return merged


def _take_apart(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Give layers weights of their own where they share them: an update of one is none of the other.

    Embeddings are shared with the head where they are tied, and layers that an adapter repeats (`layer_replication`).
    """
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for layer in layers:
        for name, weight in list(layer.named_parameters(recurse=False)):
            if owners[id(weight)] > 1:
                owners[id(weight)] -= 1
                setattr(layer, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))


def _untie(model: Any) -> None:
    """Let the configuration say so where embeddings and head are no longer the same; a saved copy would lose one."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None not in ends and ends[0].weight is not ends[1].weight:
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def _merge_in_fp32(layer: Any) -> None:
    inner = layer.get_base_layer()
    dtypes = {name: parameter.dtype for name, parameter in inner.named_parameters()}
    for parameter in inner.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    layer.merge(safe_merge=True)
    for name, parameter in inner.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])


def _resize_vocabulary(model: Any, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give the base as many tokens as the adapter was trained with; the adapter brings the embeddings of all."""
    names = {id(module): name for name, module in model.named_modules()}
    embeddings = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    sizes = [shapes.get(f"{names[id(one)]}.weight", (None,))[0] for one in embeddings]
    rows = embeddings[0].weight.shape[0]
    wanted = next((size for size in sizes if size not in (None, rows)), None)
    if wanted is None:
        return
    is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if any(size != wanted for size in (sizes[:1] if is_tied else sizes)):
        raise UserError(
            f"{adapter.name}, trained with {wanted} tokens where the base has {rows}, and it does not bring the "
            "embeddings and the head of all of them; merge it where it was trained"
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _config_file(path: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        file = Path(path) / CONFIG
        return file if file.is_file() else None
    if Path(path).is_absolute() or path.startswith("."):
        return None
    found = _hub_file(path, CONFIG, revision)
    return None if found is None else Path(found)


@lru_cache(maxsize=256)
def _hub_file(path: str, name: str, revision: str | None) -> str | None:
    """A file of a hub's repository, fetched; None where it has none, or cannot be reached and none is at hand.

    Asked once in a process: a hub that is out of reach keeps every question waiting for 24 seconds.
    """
    try:
        found: str | None = cached_file(
            path,
            name,
            revision=revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:  # no such repository or revision: who reads its configuration next says so
        return None
    return found


def _located(named: str, path: str) -> str:
    """The base that an adapter names: a directory seen from here, in the adapter's, or beside it; else a hub id.

    peft writes down what the training was given, which is often relative to where that ran.
    """
    places = [Path(named).expanduser()]
    if Path(path).is_dir():
        places += [Path(path) / named, Path(path).absolute().parent / named]
    for place in places:
        if place.is_dir():
            return str(place.resolve())
    if Path(named).is_absolute() or named.startswith((".", "~")) or named.count("/") > 1:
        raise UserError(
            f"model {path}: it is an adapter of {named!r}, and there is no such directory; looked at "
            f"{', '.join(str(place.absolute()) for place in places)}. Put the base model there, or change "
            f"base_model_name_or_path in its {CONFIG}, or merge the adapter"
        )
    return named


def _check(adapter: Adapter) -> None:
    """Refuse what is known not to be mergeable before anything is loaded."""
    kind, here = str(adapter.settings.get("peft_type", "")).upper(), Path(adapter.path)
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{adapter.name}, which needs peft to be merged: pip install 'prefsel[peft]'")
    if kind not in MERGEABLE:
        raise UserError(
            f"{adapter.name}, of a kind that is not merged into weights here; valid: {', '.join(MERGEABLE)}. Merge it "
            "where it was trained, or give the base model"
        )
    if adapter.settings.get("alora_invocation_tokens"):
        raise UserError(f"{adapter.name} that is active on part of the tokens only, so it cannot be merged")
    if not here.is_dir():
        return
    if not (here / WEIGHTS).is_file():
        others = sorted(file.name for pattern in ("*.bin", "*.pt") for file in here.glob(pattern))
        found = f"; found {others[:3]}, which is not read because it can run code" if others else ""
        raise UserError(f"{adapter.name}, but the directory has no {WEIGHTS}{found}")
    if full := sorted(file.name for file in here.glob("model*.safetensors")):
        raise UserError(f"{adapter.name}, and its directory holds full weights too ({full[0]}); keep one of the two")


def _modules(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def _is_copy(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor also stands in the file under its plain name: peft writes saved embeddings up to three times."""
    plain = name.removeprefix(_INSIDE)
    for part in (".modules_to_save", ".original_module"):
        plain = plain.replace(part, "")
    return plain != name.removeprefix(_INSIDE) and plain in shapes


def _is_in(name: str, path: str) -> bool:
    """Whether a module's name is one of the parts of a dotted path, or several in a row."""
    return f".{name}." in f".{path}."
