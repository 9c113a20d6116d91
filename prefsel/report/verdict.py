"""The verdict of a run: what was kept, and whether training on it beat training at random and on everything.

Works on the sections of the page: plain dictionaries, any key of which may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prefsel.evaluate.intervals import Values, paired_difference
from prefsel.plan.nodes import NON_TRAJECTORY_KEYS
from prefsel.report.formatting import ABSENT, is_number, number, percent, signed, text_of
from prefsel.report.tables import Table, table

CONTROLS = ("random", "all")
FREE_SETTINGS = NON_TRAJECTORY_KEYS - {"cross_fit", "divergence"}
"""Settings that make two trainings no less comparable."""
FEW_PROMPTS = 30
"""Below this a normal interval is too narrow: by 4 % at 30, by 15 % at 10 (Student's t)."""
BETTER, WORSE, NO_DIFFERENCE, UNTOLD = "better", "worse", "no difference shown", "cannot be told"


def comparisons(
    trainings: Sequence[Mapping[str, Any]], random: Sequence[str], measures: Mapping[str, Mapping[str, Values]]
) -> list[dict[str, Any]]:
    """Every trained selection beside the controls that were trained, in every measure.

    Args:
        trainings: Of policies: `name`, `selection`, `num_pairs`, `settings`, `model`, `reference`.
        random: The selections that are drawn at random.
        measures: Measure → training → values.

    Returns:
        Per trained selection, control and measure: `training`, `selection`, `control` (`random` or `all`), `against`
        (the control's training), `measure`, `difference` (an `Estimate`, None where the two share no item) and
        `unlike`, the settings in which the two trainings differ.
    """
    found = []
    for one in trainings:
        if one.get("selection") in ("all", "validation", *random):
            continue
        for control in CONTROLS:
            other = control_of(one, control, trainings, random)
            for measure, by_training in measures.items() if other is not None else ():
                ours, theirs = (by_training.get(text_of(each.get("name"))) for each in (one, other or {}))
                difference = paired_difference(ours, theirs) if ours and theirs else None
                found.append(
                    {
                        "training": one.get("name"),
                        "selection": one.get("selection"),
                        "control": control,
                        "against": (other or {}).get("name"),
                        "measure": measure,
                        "difference": None if difference is None else asdict(difference),
                        "unlike": unlike(one, other or {}),
                    }
                )
    return found


def drawn_at_random(rule: Mapping[str, Any], kinds: Mapping[str, str]) -> bool:
    """Whether a rule ranks by chance alone; `kinds` says of which kind each metric is."""
    if rule.get("kind") == "dedupe":
        return drawn_at_random(rule["rule"], kinds)
    return rule.get("kind") == "random" or kinds.get(str(rule.get("score")).removeprefix("score_")) == "random"


def control_of(
    training: Mapping[str, Any], control: str, trainings: Sequence[Mapping[str, Any]], random: Sequence[str]
) -> Mapping[str, Any] | None:
    """The training to hold another one against; None where none was trained.

    That with the fewest other settings; among these that of the selection's own control, then one on as many pairs.
    """
    wanted = random if control == "random" else ("all",)

    def distance(other: Mapping[str, Any]) -> tuple[int, bool, bool]:
        is_own = other.get("selection") == f"{training.get('selection')}-random"
        return len(unlike(training, other)), not is_own, other.get("num_pairs") != training.get("num_pairs")

    return min((one for one in trainings if one.get("selection") in wanted), key=distance, default=None)


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which two trainings differ, besides what they are trained on."""
    ours, theirs = (
        {"model": each.get("model"), "reference": each.get("reference"), **(each.get("settings") or {})}
        for each in (one, other)
    )
    return sorted(key for key in {*ours, *theirs} - FREE_SETTINGS if ours.get(key) != theirs.get(key))


def judgement(difference: Mapping[str, Any] | None) -> str:
    """What a paired difference shows: nothing where its interval holds zero, or where it has none."""
    low, high = ((difference or {}).get(end) for end in ("low", "high"))
    if not is_number(low) or not is_number(high):
        return UNTOLD
    return BETTER if low > 0 else WORSE if high < 0 else NO_DIFFERENCE


# ------------------------------------------------------------------------------------------------------- as shown


def clauses(selection: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """How the models trained on a selection compare: who against whom → (judgement, in what and by how much)."""
    told: dict[str, list[tuple[str, str]]] = {}
    for one in found:
        if one.get("selection") == selection.get("name"):
            size = (one.get("difference") or {}).get("mean")
            shown = f" ({_difference_text(size)})" if is_number(size) else ""
            other = f" (other settings: {', '.join(one['unlike'])})" if one.get("unlike") else ""
            key = f"{text_of(one.get('training'))} against {text_of(one.get('control'))}{other}"
            told.setdefault(key, []).append(
                (judgement(one.get("difference")), f"in {text_of(one.get('measure'))}{shown}")
            )
    return told


def compared(found: Sequence[Mapping[str, Any]]) -> Table:
    """One row per selection, control and measure."""
    models = {(text_of(one.get("selection")), text_of(one.get("training"))) for one in found}
    several = len({selection for selection, _ in models}) < len(models)
    rows = []
    for one in found:
        difference = one.get("difference") or {}
        low, high, num_prompts = (difference.get(key) for key in ("low", "high", "num_prompts"))
        notes = [f"other settings: {', '.join(one['unlike'])}"] if one.get("unlike") else []
        notes += ["few prompts: a rough interval"] if is_number(num_prompts) and num_prompts < FEW_PROMPTS else []
        is_told = is_number(low) and is_number(high)
        rows.append(
            [
                text_of(one.get("selection")),
                text_of(one.get("training")) if several else ABSENT,
                f"{text_of(one.get('control'))}: {text_of(one.get('against'))}",
                text_of(one.get("measure")),
                _difference_text(difference.get("mean")),
                f"{_difference_text(low)} to {_difference_text(high)}" if is_told else ABSENT,
                judgement(difference),
                number(difference.get("num_items")),
                number(num_prompts),
                "; ".join(notes) or ABSENT,
            ]
        )
    columns = {"Selection": "text", "Model": "text", "Against": "text", "Measure": "text", "Difference": "num"}
    columns |= {"95 % interval": "num", "Shown": "verdict", "Items": "num", "Prompts": "num", "Note": "text"}
    return table(columns, rows)


def _difference_text(value: Any) -> str:
    """A difference with its sign: in points of accuracy, or in a reward, which is small."""
    return signed(value, 1 if is_number(value) and abs(value) >= 10 else 2)


# ------------------------------------------------------------------------------------------------------- warnings


def below_chance(name: Any, held_out: Mapping[str, Any] | None, what: str) -> Iterator[str]:
    """A warning where a model orders fewer pairs as labelled than a coin would.

    Args:
        name: Of the model.
        held_out: An `Estimate` of its accuracy, in per cent.
        what: What the pairs are.
    """
    mean, high = ((held_out or {}).get(key) for key in ("mean", "high"))
    if is_number(mean) and mean < 50:
        sure = is_number(high) and high < 50
        end = "its whole 95 % interval lies below" if sure else "its 95 % interval holds 50 %, so this may be chance"
        yield f"{text_of(name)} orders {percent(mean, 100)} of {what} as they are labelled, below a coin's 50 %; {end}."


def not_shown(
    selections: Sequence[Mapping[str, Any]],
    trainings: Sequence[Mapping[str, Any]],
    random: Sequence[str],
    found: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    """What was not trained or not evaluated, so that the verdict cannot say it: one sentence each."""
    names = [text_of(one.get("name")) for one in selections]
    trained = {one.get("selection") for one in trainings}
    judged = [name for name in names if name in trained and name not in random]
    if not judged:
        yield "No model was trained on a selection: nothing here says whether one is worth training on."
    elif untrained := [name for name in names if name not in trained]:
        yield f"No model was trained on {listed(untrained)}."
    if judged and not trained & set(random):
        yield "No model was trained on pairs drawn at random: nothing is compared with random."
    if judged and "all" not in trained:
        yield "No model was trained on all eligible pairs: nothing is compared with training on everything."
    blind = [text_of(one.get("name")) for one in trainings if not one.get("evaluations")]
    if blind:
        yield f"Without held-out pairs (split.holdout, max_eval_pairs) nothing was measured of {listed(blind)}."
    apart = dict.fromkeys(text_of(one.get("training")) for one in found if one.get("difference") is None)
    if lacking := [name for name in apart if name not in blind]:
        yield (
            f"No paired difference for {listed(lacking)}: it and its control have no held-out item in common whose "
            "result was kept; trainings of older versions kept none."
        )


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names, the first few of many."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
