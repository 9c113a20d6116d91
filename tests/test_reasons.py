"""Every reason that the code can give has a meaning, and every meaning a place that gives its reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from prefsel import reasons
from prefsel.reasons import LOST, MISSING, QUARANTINE, QUARANTINED, SET_ASIDE, TEMPLATE_NOTES, meaning
from prefsel.rules import Dedupe
from prefsel.select import duplicates, eligible

PACKAGE = Path(reasons.__file__).parent
TREES = {
    file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text())
    for file in PACKAGE.rglob("*.py")
    if file.name != "reasons.py"
}


def name_of(node: ast.expr | None) -> str:
    """`dropped` of `dropped`, `x.dropped` and `x["dropped"]`."""
    if isinstance(node, ast.Subscript):
        return str(node.slice.value) if isinstance(node.slice, ast.Constant) else ""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def texts(node: ast.AST | None) -> Iterator[str]:
    """Texts an expression may have; of a formatted one what stands before its first value, with a star.

    What is only compared with something, or names a part of something, is not among them.
    """
    if isinstance(node, ast.JoinedStr):
        first = node.values[0] if node.values else None
        yield f"{first.value}*" if isinstance(first, ast.Constant) else "*"
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str) and node.value not in ("", "ok"):
            yield node.value
    elif node is not None and not isinstance(node, ast.Compare):
        for child in ast.iter_child_nodes(node):
            if not (isinstance(node, ast.Subscript) and child is node.slice):
                yield from texts(child)


def keys_in(node: ast.AST | None) -> Iterator[str]:
    """Keys of the dictionaries within an expression."""
    for one in ast.walk(node) if node is not None else ():
        if isinstance(one, ast.Dict):
            for key in one.keys:
                yield from texts(key)
        elif isinstance(one, ast.DictComp):
            yield from texts(one.key)


def counted(tree: ast.Module) -> Iterator[str]:
    """Reasons that are counted: keys of what is called `dropped`, and of what is assigned to it or given as it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "dropped":
            yield from keys_in(node.value)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and key.value == "dropped":
                    yield from keys_in(value)
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                parts = list(zip(target.elts, getattr(node.value, "elts", ()))) if isinstance(target, ast.Tuple) else []
                for one, value in parts or [(target, node.value)]:
                    if name_of(one) == "dropped":
                        yield from keys_in(value)
                        if isinstance(value, ast.Call) and name_of(value.func) in ("Counter", "if_else"):
                            yield from texts(value)
                    elif isinstance(one, ast.Subscript) and name_of(one.value) == "dropped":
                        yield from texts(one.slice)


def marked(tree: ast.Module) -> Iterator[str]:
    """Reasons that are written beside single rows: into `reasons[…]`, `dropped[…]` or a completion's `status`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                parts = list(zip(target.elts, getattr(node.value, "elts", ()))) if isinstance(target, ast.Tuple) else []
                for one, value in parts or [(target, node.value)]:
                    is_row = isinstance(one, ast.Subscript) and name_of(one.value) in ("reasons", "dropped")
                    if is_row or name_of(one) == "reasons":
                        yield from texts(value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "status.append":
            yield from texts(node)


def given() -> set[str]:
    found = {text for tree in TREES.values() for find in (counted, marked) for text in find(tree)}
    found |= {f"same_{by}" for by in get_args(Dedupe.model_fields["by"].annotation)}
    return found | set(eligible.REASONS) | set(duplicates.REASONS)


def test_every_reason_that_a_stage_gives_has_a_meaning() -> None:
    found = given()
    assert {"template_error", "unused", "over_max_pairs", "generated_nothing", "trained_on", "ineligible"} <= found
    assert not {reason for reason in found if not reason.endswith("*") and not meaning(reason)}
    assert {reason for reason in found if reason.endswith("*")} == {f"{QUARANTINED}*", f"{MISSING}*", "same_*"}


def test_every_meaning_is_of_a_reason_that_something_gives() -> None:
    written = {
        text
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        for text in texts(node)
    }
    assert {*LOST, *SET_ASIDE, *QUARANTINE} - written <= {"same_prompt", "same_pair"}  # made of `same_` and a name
    assert {"same_prompt", "same_pair"} <= given()


def test_every_reason_stands_once() -> None:
    assert len({*LOST, *SET_ASIDE}) == len(LOST) + len(SET_ASIDE)
    assert not any(reason.startswith((QUARANTINED, MISSING)) for reason in (*LOST, *SET_ASIDE))


def test_reasons_in_words() -> None:
    assert meaning("quarantined:not_json") == "the line is not JSON"
    assert meaning("missing_rm_x_chosen") == "no number in rm_x_chosen"
    assert meaning("nobody_knows") == meaning("quarantined:nobody_knows") == ""


def test_the_documentation_names_reasons_that_there_are() -> None:
    page = (PACKAGE.parent / "docs" / "reliability.md").read_text()
    rows = re.search(r"\| reason \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    assert rows
    named = re.findall(r"`([a-z_<>]+)`", "".join(line.split("|")[1] for line in rows[1].splitlines()))
    assert len(named) > 10
    assert {one for one in named if not meaning(one) and one != "quarantined"} == set()


def test_every_note_of_a_template_has_its_words() -> None:
    makers = [ast.parse((PACKAGE / "models" / name).read_text()) for name in ("chat.py", "writer.py")]
    made = {
        node.args[0].value
        for tree in makers
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and name_of(node.func) == "Note" and isinstance(node.args[0], ast.Constant)
    }
    described = ast.parse((PACKAGE / "models" / "template.py").read_text())
    texts_of = {node.value for node in ast.walk(described) if isinstance(node, ast.Constant)}
    assert made <= TEMPLATE_NOTES.keys()
    assert {"thinking_dropped", "changed", "blank", "ends_twice"} == {one for one in TEMPLATE_NOTES if one in texts_of}
    assert TEMPLATE_NOTES.keys() - texts_of - made <= {"prompt_changed"}  # named where it is counted
