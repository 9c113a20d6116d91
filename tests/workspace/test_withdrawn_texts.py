"""Texts that are looked for together are found where each of them alone is."""

from __future__ import annotations

import random

import pytest

from prefsel.withdraw.texts import SHORT_TEXT, Texts


@pytest.mark.parametrize("short", [False, True])
def test_a_text_is_found_where_it_stands(short: bool) -> None:
    rng = random.Random(3)

    def words(most: int) -> str:
        return "".join(rng.choice("ab") for _ in range(rng.randint(1, most)))

    texts = {words(2 * SHORT_TEXT) for _ in range(60)} | {""}
    looked_for = Texts(texts)
    long_enough = [one for one in texts if one and (short or len(one) >= SHORT_TEXT)]
    found = []
    for _ in range(300):
        text = words(200) if rng.random() < 0.5 else words(40) + rng.choice(long_enough) + words(3)
        found.append(looked_for.within(text, short=short))
        assert found[-1] == any(one in text for one in long_enough), text
    assert True in found
    assert not looked_for.within("", short=short)
