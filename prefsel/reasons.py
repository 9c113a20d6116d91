"""Why a row, a completion or a pair went no further: every reason that a stage counts, once, and what it means.

A reason is a word in an artifact (`dropped`, `reason_<selection>`) and in the counts of a stage. Two kinds end in a
name: `quarantined:<reason>`, whose rest is a key of `QUARANTINE`, and `missing_<column>`.
"""

from __future__ import annotations

NOT_SELECTED = "not_selected"
"""Of a pair that has every score its rule reads."""
QUARANTINED, MISSING = "quarantined:", "missing_"
"""How reasons begin that end in a name."""

QUARANTINE = {
    "not_json": "the line is not JSON",
    "missing_field": "a field the format needs is absent or null",
    "wrong_type": "a field, or the row itself, has another type than the format says",
    "unread_field": "a field that changes what the model saw, and that the format does not read, is filled",
    "content_part": "a message holds a part that is no text, such as an image",
    "empty_prompt": "the prompt has no text",
    "empty_completion": "a completion, or a message of it, has no text",
    "identical_completions": "chosen and rejected, or all completions, are the same text",
    "too_few_completions": "fewer than two completions",
    "prompt_mismatch": "chosen and rejected do not answer the same prompt",
    "non_finite_score": "a score is NaN or infinite",
    "undecodable": "the bytes are not UTF-8, or the text holds lone surrogates",
    "row_too_large": "the row is over the size limit",
    "truncated_gzip": "the gzip data ends early or is corrupt; stands for the rest of the file",
    "truncated_stream": "the compressed data ends early or is corrupt; stands for the rest of the file",
    "not_delimited": "the row has more or fewer cells than the header, or its quotes do not match",
    "truncated_parquet": "the Parquet file, or one of its row groups, is cut or corrupt; stands for all rows of it",
    "truncated_arrow": "the Arrow data is cut or corrupt; stands for the rest of the file",
    "withdrawn": "it was taken back (`prefsel withdraw`); no text of it is kept",
}
"""Why an input row cannot be used."""
LOST = {
    "duplicate": "the same came earlier; the first one stays",
    "contradiction": "the same two completions are labelled both ways",
    "holdout_prompt": "its prompt also stands in a held-out source",
    "excluded_prompt": "its prompt stands in a set that must stay unseen",
    "too_long": "longer than the model's max_length",
    "template_error": "the chat template refuses it, writes nothing of it, or cannot tell the response from its prompt",
    "same_tokens": "its two completions are the same tokens to the model, so nothing can be learned from it",
    "poisoned": "the model gave NaN or infinity, also when it was asked alone",
    "empty": "the response has no text",
    "repetitive": "the response repeats itself, or ends in a loop",
    "cut_off": "the response was cut at the limit of new tokens",
    "meta_answer": "what the policy wrote talks about its task, or refuses it, instead of doing it",
    "duplicate_response": "an earlier sample of the prompt has the same text",
    "generated_nothing": "the policy's own response was empty",
    "generated_unscored": "the policy's own response is too long for the reward model",
    "same_prompt": "another pair of its prompt has a better score",
    "same_pair": "the same two completions stand under another aspect with a better score",
    "too_few_responses": "its prompt has fewer responses than a pair needs, or than were asked for",
    "unjudged": "a judge gave no number for so many of its responses that no pair is left",
    "unanswered": "the model has no answer of use to it",
    "baseline_unanswered": "the baseline has no answer of use to it, so there is nothing to compare with",
    "tied": "no two of its responses differ in what judges them, or in their text",
    "within_bounds": "its responses lie no further apart than the margin, or than the bounds of the judges, allow",
    "one_generator": "no response of the strong generator, or none of the weak one, answers its prompt",
    "no_user_turn": "its prompt does not end with a text of the user, so there is nothing to rewrite",
    "unchanged": "the rewritten prompt is the old one",
    "length_ratio": "the rewritten prompt is longer or shorter than the old one by more than the factor allowed",
    "seen_prompt": "the rewritten prompt was there before",
    "too_long_for_judge": "the judge cannot read the rewritten prompt and an answer",
    "length_gap": "its responses differ in length by more than the limit, or a length is unknown",
}
"""Why something was lost that might have been used."""
SET_ASIDE = {
    NOT_SELECTED: "scored, but outside what the rule keeps",
    "holdout": "kept for evaluation: never selected, never trained on",
    "validation": "what selection aims at: never selected, never evaluated on",
    "proxy": "its prompt trains the models made here, so they may not score it",
    "unused": "the training of this model did not need it",
    "trained_on": "the model was trained on this prompt, so it may not score it",
    "own_aspect": "labelled with the aspect the model was trained for, so it may not score it",
    "over_max_pairs": "beyond the number of pairs this training was told to use",
    "reward_holdout": "kept to measure the reward model on",
    "ineligible": "cannot be selected, so its gradient was not taken",
    "not_drawn": "more prompts than were asked for, or one that was drawn elsewhere",
    "other_stratum": "of no stratum that the tangent was asked for",
}
"""Why something was put to another use, or to none, without a fault of its own."""

TEMPLATE_NOTES = {
    "template_error": "refused, and without a number",
    "same_tokens": "the same tokens as another one of the prompt: pairs of two such are dropped",
    "parts": "the template takes content as parts, not as text: they were given as parts",
    "opening": "the generation prompt opens with more than the turn of an answer does: answers begin before that",
    "dated": "the template writes the day's date into the prompt: another day gives other tokens, and other numbers",
    "no_end": "the template writes no end of the turn: the model is not asked whether it would stop",
    "ends_twice": "the answer has the end of the turn already, and the template writes it again",
    "thinking_dropped": "the template leaves the reasoning out: what is scored is not all that was answered",
    "changed": "the template does not write all of the answer as it came",
    "blank": "white space that the template does not write: nothing but the end of the turn is left",
    "prompt_changed": "the template does not write all of the prompt as it came",
    "special_text": "the text of a special token stands in the content, and becomes that token",
}
"""What a chat template did with completions, in words. All but the first were scored, as the template wrote them."""


def meaning(reason: str) -> str:
    """A reason in words; empty for one that no stage here gives."""
    if reason.startswith(QUARANTINED):
        return QUARANTINE.get(reason.removeprefix(QUARANTINED), "")
    if reason.startswith(MISSING):
        return f"no number in {reason.removeprefix(MISSING)}"
    return LOST.get(reason) or SET_ASIDE.get(reason, "")
