"""What is public: `prefsel` and the modules it hands out. All they export says what it takes, gives and raises."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefsel
from prefsel.plugins.registry import Registry

PACKAGES = (
    "prefsel",
    "prefsel.metrics",
    "prefsel.select",
    "prefsel.models",
    "prefsel.plugins",
    "prefsel.trl",
    "prefsel.ingest.formats",
)


def exported() -> Iterator[tuple[str, Any]]:
    """Every public object by its dotted name, modules apart."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            found = getattr(module, name)
            if not inspect.ismodule(found):
                yield f"{package}.{name}", found


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, and the public methods that classes of ours define."""
    for name, found in exported():
        if inspect.isfunction(found):
            yield name, found
        elif inspect.isclass(found):
            for attribute, method in vars(found).items():
                # A function that is a field's default is no method.
                if inspect.isfunction(method) and method.__name__ == attribute and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", method


def sections(text: str) -> dict[str, str]:
    """The sections of a Google-style docstring by name, and what stands before them under ""."""
    parts = re.split(r"^(Args|Returns|Raises|Yields|Source):", inspect.cleandoc(text), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def test_the_packages_hand_out_their_names() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        assert len(set(module.__all__)) == len(module.__all__)
        assert set(module.__all__) <= set(dir(module))
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="nonsense"):
            module.nonsense  # noqa: B018
    assert {name for name, _ in exported()} >= {
        "prefsel.open",
        "prefsel.metrics.score_table",
        "prefsel.select.select_table",
        "prefsel.models.score_groups",
        "prefsel.models.directional_logps",
    }


@pytest.mark.parametrize(
    "code",
    [
        "prefsel.metrics.score_table, prefsel.select.select_table, prefsel.config.Config, prefsel.errors.UserError",
        "prefsel.models, prefsel.open, prefsel.Workspace, prefsel.plugins.register_metric",
        "prefsel.metrics.score_table({'rm_x_chosen': [2.0], 'rm_x_rejected': [1.0]}, 'explicit_margin', rm='x')",
        "prefsel.select.select_table({'pair_id': [1, 2], 's': [1.0, 2.0]}, {'kind': 'top', 'score': 's', 'count': 1})",
    ],
)
def test_attributes_come_without_an_import_and_without_torch_or_ray(code: str) -> None:
    script = f"import sys, prefsel\n{code}\nassert not {{'torch', 'ray', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(prefsel.__file__).parents[1])


def test_every_public_name_has_a_docstring_of_whole_sentences() -> None:
    for name, found in exported():
        documented = type(found) if isinstance(found, Registry) else found
        text = documented.__doc__ or ""
        assert text, name
        first = inspect.cleandoc(text).split("\n\n")[0]
        assert first.endswith("."), f"{name}: {first!r}"
        assert not (dataclasses.is_dataclass(found) and text.startswith(f"{found.__name__}(")), f"{name}: generated"


def test_public_functions_say_what_they_take_give_and_raise() -> None:
    checked = 0
    for name, function in functions():
        text, signature = function.__doc__ or "", inspect.signature(function)
        assert text, name
        parameters = [one for one in signature.parameters.values() if one.name != "self"]
        if len(parameters) < 2 or "Contract." in name:
            continue
        found = sections(text)
        assert {"Args", "Raises"} <= found.keys(), name
        assert signature.return_annotation in (None, "None") or "Returns" in found, name
        told = re.findall(r"^    \*{0,2}(\w+): +\S", found["Args"], flags=re.MULTILINE)
        assert told == [one.name for one in parameters], name
        for part, body in found.items():
            assert not part or body.rstrip().endswith("."), f"{name}: {part} is not a sentence"
        checked += 1
    assert checked >= 6


def test_every_field_of_a_public_record_is_described() -> None:
    """A class says in a string below each field what it holds."""
    for name, found in exported():
        if not inspect.isclass(found) or not dataclasses.is_dataclass(found):
            continue
        (node,) = ast.parse(inspect.cleandoc(inspect.getsource(found))).body
        assert isinstance(node, ast.ClassDef)
        for field, after in zip(node.body, [*node.body[1:], None]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                is_told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert is_told, f"{name}.{field.target.id}"
