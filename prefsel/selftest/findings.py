"""What is seen without a forward: templates, limits, vocabularies, control tokens and pad tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from prefsel.errors import TemplateError, UserError
from prefsel.models.chat import EncodedGroup, Encoder
from prefsel.models.loading import check_vocabulary
from prefsel.models.reward import own_pad_token
from prefsel.models.writer import BUILT_IN, Messages, Writer
from prefsel.selftest.subject import Finding, Sample, Subject


def template_findings(subject: Subject, sample: Sample) -> list[Finding]:
    """Completions that the template cannot share their prompt with.

    A run drops a few such completions and stops at more than half. A template that itself writes another prompt once
    an answer follows it fails here at the first one, a tokenizer that merges across the boundary does not.
    """
    encoder, statuses = subject.encoder, [group.status for group in subject.groups]
    bad = [(g, c) for g, row in enumerate(statuses) for c, status in enumerate(row) if status == "template_error"]
    if not bad:
        return []
    total = sum(map(len, statuses))
    unstable = next(filter(None, (_unstable(encoder, *sample.groups[g], c) for g, c in bad)), "")
    is_failure = bool(unstable) or 2 * len(bad) > total
    told = f"{len(bad)} of {total} completions cannot be told from their prompt{unstable}; {encoder.tolerated}"
    told += "" if is_failure else "; a run drops them as template_error"
    return [Finding("FAIL" if is_failure else "warn", "template", told, is_input=is_failure)]


def _unstable(encoder: Encoder, prompt: Messages, completions: Sequence[Messages], number: int) -> str:
    """How the template's text of a prompt changes when an answer follows; empty when it does not."""
    if encoder.template in BUILT_IN:
        return ""
    written = Writer(encoder.tokenizer, encoder.template, ending="").write(prompt, [completions[number]])
    asked, (whole,) = written.prompt, written.completions
    if isinstance(whole, TemplateError) or whole.startswith(asked):  # a refusal the encoder has reported
        return ""
    at = next((i for i, (a, b) in enumerate(zip(asked, whole)) if a != b), min(len(asked), len(whole)))
    shown = [text[max(0, at - 12) : at + 24] for text in (asked, whole)]
    return f", because it is not prefix-stable: it writes …{shown[0]!r}… to ask, but …{shown[1]!r}… once answered"


def length_findings(subject: Subject, uncut: Sequence[EncodedGroup]) -> list[Finding]:
    """Whether the length limit leaves anything, and what it cuts."""
    statuses = [status for group in subject.groups for status in group.status]
    num_ok, num_long, limit = statuses.count("ok"), statuses.count("too_long"), subject.encoder.max_length
    if num_long and not num_ok:
        lengths = [len(whole.prompt_tokens) + len(tokens) for whole in uncut for tokens in whole.completion_tokens]
        told = f"got {limit}, but the shortest completion has {min(lengths)} tokens with its prompt; raise it"
        return [Finding("FAIL", "max_length", told, is_input=True)]
    found = []
    if 2 * num_long > len(statuses):
        told = f"{num_long} of {len(statuses)} completions are dropped as too_long at {limit} tokens"
        found.append(Finding("warn", "max_length", told))
    if subject.cut:
        is_right = subject.encoder.truncation == "right"
        lost = "their end and its end-of-turn" if is_right else "the beginning of their prompt"
        told = f"{len(subject.cut)} of {num_ok} scored completions lost {lost} at {limit} tokens"
        found.append(Finding("warn", "truncation", told))
    return found


def vocabulary_findings(subject: Subject) -> list[Finding]:
    """Whether every token of the tokenizer has a row of the embedding."""
    try:
        check_vocabulary(subject.tokenizer, subject.model)
    except UserError as error:
        return [Finding("FAIL", "vocabulary", str(error), is_input=True)]
    return []


def text_findings(subject: Subject, sample: Sample) -> list[Finding]:
    """A doubled bos, answers that do not end, and control tokens that stand in the user's own text."""
    tokenizer, found = subject.tokenizer, []
    bos, control = tokenizer.bos_token_id, _control_tokens(tokenizer)
    if twice := sum(group.prompt_tokens[:2] == [bos, bos] for group in subject.groups):
        told = f"{twice} of {len(subject.groups)} prompts begin with two {tokenizer.bos_token!r}: one too many"
        found.append(Finding("warn", "bos twice", told))
    ends = [key for key in subject.keys if subject.encoder.truncation != "right" or key not in subject.cut]
    open_ended = [key for key in ends if not _is_closed(tokenizer, subject.sequence(key)[1], control)]
    if open_ended:
        told = f"{len(open_ended)} of {len(ends)} responses end in no control token: that they stop is not scored"
        found.append(Finding("warn", "end of turn", told))
    said = {m["content"] for prompt, rest in sample.groups for messages in (prompt, *rest) for m in messages}
    texts = sorted(said - {None})  # beside a tool call there may be no text
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    hits = [hit for hit in (next((i for i in row if i in control), None) for row in ids) if hit is not None]
    if hits:
        token = tokenizer.convert_ids_to_tokens(hits[0])
        told = f"{len(hits)} of {len(texts)} messages hold text that becomes a control token, first {token!r}"
        found.append(Finding("warn", "control tokens", told))
    return found


def _control_tokens(tokenizer: Any) -> set[int]:
    """Special and added tokens; not the unknown one, which stands for text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}


def _is_closed(tokenizer: Any, response: Sequence[int], control: Collection[int]) -> bool:
    """Whether the last token that is not blank is a control token: ChatML ends a turn with one and a line break."""
    for token in reversed(response):
        if token in control:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def pad_findings(subject: Subject) -> list[Finding]:
    """What a pad token that is also the eos, or not the model's, does and does not do here."""
    tokenizer, found = subject.tokenizer, []
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if subject.is_reward:
        own = own_pad_token(subject.model)
        if own is not None and own == eos_id:
            told = "the classifier reads the token before the last eos, as transformers does, alone and in batches"
            found.append(Finding("info", "pad = eos", told))
        if own is not None and pad_id not in (None, own):
            told = f"the model's pad token is {own}, the tokenizer's {pad_id}; rows here are padded with the model's"
            found.append(Finding("warn", "pad token", told))
        if subject.pad_token_id is None:
            told = "neither model nor tokenizer has one: padded rows hold one sequence"
            found.append(Finding("info", "pad token", told))
    elif pad_id is not None and pad_id == eos_id:
        responses = [subject.sequence(key)[1] for key in subject.keys]
        lost, total = sum(ids.count(pad_id) for ids in responses), sum(map(len, responses))
        told = f"all {total:,} response tokens are counted; a mask of `ids != pad` would lose {lost:,} of them"
        found.append(Finding("info", "pad = eos", told))
    return found
