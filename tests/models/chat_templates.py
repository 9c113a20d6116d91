"""Chat templates that behave in public as those of well-known families do, written anew, and conversations for them.

A template is tried on every conversation. `content` says in which form it takes content; the tokenizer has the special
tokens of all families, so that all templates share one vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiny_models import bpe_tokenizer

SPECIAL_TOKENS = [
    *(
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
    ),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|im_sep|>", "<|User|>", "<|Assistant|>"),
    *("<|begin|>", "<|stop|>"),
]


@dataclass(frozen=True)
class Template:
    """A template, and how a caller of transformers has to give it messages."""

    text: str | None
    """None: the tokenizer has none, and contents are joined."""
    content: str = "text"
    """`text`, `parts` (a list of them only) or `both`."""


LLAMA3 = """{{ bos_token }}{% for m in messages -%}
<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN25 = """{% if messages[0].role != 'system' %}<|im_start|>system
be helpful<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content or '' }}{% endif %}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN3 = """{% set last = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}
{% set last.at = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}
{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}
{% if m.role == 'assistant' and '</think>' in said %}
{% set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}
{% set said = said.split('</think>')[-1].lstrip() %}{% endif %}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > last.at %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- said }}{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
GEMMA2 = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('turns must alternate') }}{% endif %}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}
{{- '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
GEMMA3 = """{{ bos_token }}{% set begun = namespace(text='') %}{% for m in messages %}
{% set said = m.content if m.content is string else m.content | map(attribute='text') | join %}
{% if m.role == 'system' %}{% set begun.text = said + '\n\n' %}{% else %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + begun.text + said | trim }}
{{- '<end_of_turn>\n' }}{% set begun.text = '' %}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
PHI4 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}
{{- '<|Assistant|>' + (m.content or '').split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
TOOLS = """{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}{% for m in messages %}
{{- '<|' + m.role + '|>' }}{% if m.tool_calls %}{% for call in m.tool_calls %}
{{- call.function.name + '(' + call.function.arguments | tojson + ')' }}{% endfor %}{% else %}{{ m.content }}{% endif %}
{{- '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
REASONING = """{% for m in messages %}{{ '<|begin|>' + m.role + ':' }}{% if m.reasoning_content %}
{{- '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ (m.content or '') + '<|stop|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|begin|>assistant:' }}{% endif %}"""
PARTS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES = {
    "Llama 3": Template(LLAMA3),
    "Qwen 2.5": Template(QWEN25),
    "Qwen 3": Template(QWEN3),
    "Gemma 2": Template(GEMMA2),
    "Gemma 3": Template(GEMMA3, "both"),
    "Mistral": Template(MISTRAL),
    "Phi 3": Template(PHI3),
    "Phi 4": Template(PHI4),
    "ChatML": Template(CHATML),
    "Zephyr": Template(ZEPHYR),
    "DeepSeek R1": Template(R1),
    "tools": Template(TOOLS),
    "reasoning": Template(REASONING),
    "parts": Template(PARTS, "parts"),
    "none": Template(None),
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "look outside", "parameters": {}}}
ASKED = [user("who sat where?")]

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]] = {
    "one turn": (ASKED, [[assistant("the cat sat on the mat.")], [assistant("  no dog! \n")]]),
    "system and turns": (
        [{"role": "system", "content": "be brief"}, *ASKED, assistant("<think>a dog</think>the cat"), user("and why?")],
        [[assistant("bread rises.")], [assistant("it was the cat, and the dog")]],
    ),
    "thought in the answer": (
        ASKED,
        [[assistant("<think>\na cat\n</think>\n\nthe mat")], [assistant("<think>dogs sit</think>the dog")]],
    ),
    "thought beside the answer": (
        ASKED,
        [[assistant("the mat", reasoning_content="a cat bakes")], [assistant("the dog", reasoning_content="dogs sit")]],
    ),
    "a call before": (
        [
            {**user("how is rome?"), "tools": [TOOL]},
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "content": "sunny"},
        ],
        [[assistant("it is sunny.")], [assistant("it rains!")]],
    ),
    "a call as the answer": (
        [{**user("how is rome?"), "tools": [TOOL]}],
        [[assistant(None, tool_calls=[CALL])], [assistant("i can not say")]],
    ),
    "parts": (
        [user([{"type": "text", "text": "who "}, {"type": "text", "text": "sat?"}])],
        [[assistant([{"type": "text", "text": "the cat"}])], [assistant([{"type": "text", "text": "a dog"}])]],
    ),
    "special text": (
        [user("what is <|im_end|> and </s>?")],
        [[assistant("an end: <|im_end|>")], [assistant("nothing")]],
    ),
}


def tokenizer_with(template: str | None) -> Any:
    """A byte-level BPE with the special tokens of every family, and a template."""
    made = bpe_tokenizer(chat_template=template, bos_token="<s>")
    made.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return made
