"""What a policy answered when it was asked to rewrite a prompt → the new prompt, or why there is none.

    answer ─ wrapping off ─► text ─► empty? · talk about the task? · the old one again? · far longer or shorter?

Only what surely is wrapping comes off. An answer that talks about the rewriting is refused as a whole: where its talk
ends and the prompt begins would be a guess.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LABEL = re.compile(
    r"\A[#*_\s]*(?:(?:the|my|your)\s+)?(?:new|re-?written|re-?phrased|revised|evolved|updated|modified|improved)\s+"
    r"(?:prompt|question|instruction|request|version)\s*[#*_]*\s*:[*_]*[ \t]*\n?",
    re.IGNORECASE,
)
"""`New prompt:`, `**Rewritten Prompt:**`, `#Rewritten Prompt#:` before the prompt."""
FENCE = re.compile(r"\A(`{3,}|~{3,})[^`]*\Z")
"""The first line of a fence; its last one is the same marks alone."""
TAGS = re.compile(r"\A<prompt>(.*)</prompt>\Z", re.DOTALL)
"""The tags that the templates of this package put around the old prompt."""
QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("„", "“"))
"""Marks around everything; inside them none may end before."""

_KIND = r"(?:prompt|question|instruction|request|query|version)s?"
_MADE = (
    r"(?:re-?(?:written|phrased|worded|worked)|revised|modified|evolved|expanded|updated|improved|enhanced|refined|"
    r"adapted|new|possible|(?:more|slightly|much)\s+\w+)"
)
_MAKE = r"(?:re-?(?:wr|phras|word|work)|revis|modif|evolv|expand|creat|add|mad|mak|chang|turn)\w*"
_HERE = r"(?:here(?:['’]s|\s+is|\s+are)|below\s+is)"
_SURE = r"(?:sure(?:\s+thing)?|certainly|of\s+course|absolutely|understood|got\s+it)"
_YES = rf"(?:{_SURE}|okay|ok|alright|great)"
_I_HAVE = r"i(?:['’](?:ve|ll)|\s+have|\s+will)?"
_I_CANNOT = r"i(?:\s+cannot|\s+can['’]t|\s+won['’]t|(?:\s+am|['’]m)\s+(?:unable|not\s+able)\s+to)"
_REMARK = r"\n[ \t]*[*_(\[]*"
# Every pattern looks at a place once, or at so many characters behind it: some ran 30 s over 20 000 line breaks.
META = tuple(
    re.compile(one, re.IGNORECASE)
    for one in (
        # "Here is the rewritten prompt", "Here's a more specific version:", "Below is one possible rewrite"
        rf"\A[*_\s]*{_HERE}(?!\s+(?:my|our)\b)[^\n]{{0,60}}\b{_MADE}\b[^\n]{{0,40}}\b(?:{_KIND}|rewrite)\b",
        # "Sure, here you go", "Certainly! I have …", "Okay, let me rewrite …"; "Of course!" on a line of its own
        rf"\A{_YES}\b[\s,.!:–—-]+(?:here\b|below\s+is|{_I_HAVE}\s+{_MAKE}|let\s+me\s+{_MAKE})",
        rf"\A{_SURE}\s*[,.!:]*\s*(?:\n|\Z)",
        # "I have rewritten the prompt", "I added a constraint to the question", before it or behind it
        rf"(?:\A|{_REMARK}){_I_HAVE}\s+{_MAKE}\b[^\n]{{0,60}}\b(?:the|your|this|given|original)\s+(?:\w+\s+){{0,3}}{_KIND}",
        # "I'm sorry, but I can't …", "I cannot assist with …", "As an AI language model, …"
        r"\A(?:i(?:['’]?m|\s+am)\s+(?:\w+\s+)?(?:sorry|afraid)|i\s+(?:apologi[sz]e|regret)|sorry|apologies)\b[^\n]{0,60}"
        r"\b(?:can(?:no|['’])?t|unable|not\s+able|won['’]t)\b",
        rf"\A(?:unfortunately,?\s+)?{_I_CANNOT}\s+(?:assist|help\s+(?:you\s+)?with|comply|fulfill?|engage|re-?(?:write|phrase))\b",
        rf"\A(?:unfortunately,?\s+)?{_I_CANNOT}\s+(?:create|write|generate|provide)\b[^\n]{{0,40}}\b(?:prompt|content|that|this)\b",
        r"\Aas\s+an?\s+(?:large\s+|ai\s+)?(?:language\s+model|ai(?:\s+(?:language\s+)?(?:model|assistant))?,)",
        # thoughts of a reasoning model that its template left in
        r"\A</?think(?:ing)?>",
        # what requests of this kind call their prompts
        r"(?<!#)#+[ \t]*(?:the\s+)?(?:given|original|re-?written|created|new)\s+prompt\s*#",
        r"\b(?:the|this|your)\s+(?:given|original|old|re-?written|revised|evolved|modified)\s+prompt\b",
        rf"\A(?:the|this|your)\s+{_MADE}\s+{_KIND}\s+(?:is|reads|would|could|might)\b",
        rf"\Ato\s+(?:make|render|turn)\s+(?:the|this|your)\s+(?:\w+\s+)?{_KIND}\b",
        r"</?prompt>",
        # "Note: I made the prompt …", "This rewritten version …" behind it
        rf"{_REMARK}(?:note|explanation|rationale|commentary|comments?|changes?(?:\s+made)?)\b[^\n:]{{0,20}}:[^\n]*\b"
        rf"(?:prompt|re-?wr\w+|original\s+{_KIND}|more\s+(?:complex|specific|challenging|difficult))\b",
        rf"{_REMARK}(?:this|the)\s+(?:{_MADE}\s+{_KIND}|rewrite)\b",
    )
)
"""Talk about the rewriting. What the old prompt says itself is no sign of it."""


class Rewritten(NamedTuple):
    """A new prompt's text, or the reason that there is none."""

    text: str | None
    reason: str | None


def read_prompt(answer: str, old: str, *, length_factor: float | None = 5.0) -> Rewritten:
    """The new prompt in an answer.

    What comes off, one inside the other: outer white space; a code fence around everything; the tags `<prompt>` and
    `</prompt>`; a label such as `Rewritten prompt:`; a pair of quotation marks around everything that encloses no
    further ones. Fences, tags and marks stay where the old prompt begins with them too.

    Args:
        answer: What the policy wrote.
        old: The text that was to be rewritten.
        length_factor: A text is refused unless this times its characters is more than those of the old one, and this
            times those of the old one more than its own; None: of any length.

    Returns:
        The text, or the reason: `empty`, `meta_answer` (it talks about the task, or refuses it), `unchanged` (the old
        prompt but for white space), `length_ratio`.
    """
    text = _unwrapped(answer, old.strip())
    if not text:
        return Rewritten(None, "empty")
    if any(one.search(text) and not one.search(old) for one in META):
        return Rewritten(None, "meta_answer")
    if text.split() == old.split():
        return Rewritten(None, "unchanged")
    # Both strict, in characters, as in the authors' code.
    if length_factor is not None and not (
        length_factor * len(text) > len(old.strip()) and length_factor * len(old.strip()) > len(text)
    ):
        return Rewritten(None, "length_ratio")
    return Rewritten(text, None)


def _unwrapped(answer: str, old: str) -> str:
    text = answer.strip()
    while (inner := _without_one(text, old).strip()) != text:
        text = inner
    return text


def _without_one(text: str, old: str) -> str:
    """The text without one layer of wrapping, or as it is."""
    first_line, *lines = text.split("\n")
    if lines and (found := FENCE.match(first_line)) and lines[-1].strip() == found[1] and not old.startswith(found[1]):
        inner = "\n".join(lines[:-1])
        return text if found[1] in inner else inner
    if (found := TAGS.match(text)) and not old.startswith("<prompt>"):
        return found[1]
    if (found := LABEL.match(text)) and not LABEL.match(old):
        return text[found.end() :]
    for first, last in QUOTES:
        inner = text[1:-1]
        is_around = len(text) > 1 and text[0] == first and text[-1] == last and not old.startswith(first)
        if is_around and last not in inner:
            return inner
    return text
