"""A template runs in a sandbox, within limits; what it may not do is one message."""

from __future__ import annotations

import threading
import time

import pytest
from tiny_models import CHATML, bpe_tokenizer

from prefsel.errors import TemplateError, UserError
from prefsel.models import template_limits, writer
from prefsel.models.chat import Encoder
from prefsel.models.template_limits import TooSlow, excess, within

LOOP = "{% for i in range(99999) %}"
ASKED = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 'x' * 10**10 }}", "over 1024 MiB"),
        ("{{ 'x'.center(9999999999) }}", "over 1024 MiB"),
        (
            "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "over 1024 MiB",
        ),
        (f"{LOOP}{{{{ messages }}}}{{% endfor %}}", "over 4,194,304 characters"),
        (LOOP * 3 + "{% endfor %}" * 3, "over 5 s"),
    ],
)
def test_a_template_that_takes_everything_is_refused_before_it_is_used(template: str, told: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=f"it takes {told} for 32 short turns"):
        Encoder(bpe_tokenizer(), template)
    assert time.monotonic() - began < 40  # a busy machine's seconds, for 5 of CPU


def test_an_ordinary_template_or_one_with_a_fault_of_its_own_is_within_its_limits() -> None:
    for template in (
        CHATML,
        "{% generation %}x{% endgeneration %}",
        "{{ 1 // 0 }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
    ):
        assert excess(template) == ""


@pytest.mark.parametrize(
    "escape",
    [
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_neither_python_nor_files_nor_the_messages(escape: str) -> None:
    """What transformers' sandbox is relied upon for."""
    with pytest.raises(TemplateError):
        Encoder(bpe_tokenizer(), CHATML + escape).encode_group(ASKED, [[{"role": "assistant", "content": "yes"}]])


def test_a_conversation_that_makes_a_template_hang_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RENDER_S", 0.5)
    hangs = f"{{% if 'bomb' in messages[-1].content %}}{LOOP * 3}{'{% endfor %}' * 3}{{% endif %}}"
    answers = [[{"role": "assistant", "content": text}] for text in ("fine", "a bomb", "fine too")]
    encoded = Encoder(bpe_tokenizer(), CHATML + hangs).encode_groups([(ASKED, answers)], strict=False)[0]
    assert encoded.status == ["ok", "template_error", "ok"]
    assert "it was ended after" in encoded.notes[0].example


def test_the_clock_ends_only_what_is_late_in_any_thread_and_leaves_nothing_behind() -> None:
    late: list[bool] = []

    def spin() -> None:
        try:
            within(0.3, lambda: [None for _ in iter(int, 1) if False])
        except TooSlow:
            late.append(True)

    threads = [threading.Thread(target=spin) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert [within(30, lambda n=n: n) for n in range(10_000)] == list(range(10_000))
    for thread in threads:
        thread.join(timeout=20)
    assert late == [True] * 3
    assert not template_limits._CLOCK._ends
    with pytest.raises(KeyError):
        within(30, lambda: {}[1])
    assert not template_limits._CLOCK._ends
