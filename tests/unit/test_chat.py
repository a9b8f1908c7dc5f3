"""Chat templates: the options and helpers that templates written for transformers rely on, in a sandbox."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from flatout.core.chat import render_chat
from flatout.errors import ConfigError, ModelFileError

USER = [{"role": "user", "content": 'a "quoted" <b>'}]


def render(template: str, messages: Any = USER, generate: bool = True) -> str:
    return render_chat(template, messages, generate=generate, bos="<s>", eos="</s>")


def test_what_templates_rely_on() -> None:
    assert render("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}") == (
        '<s>a "quoted" <b></s>'
    )
    assert render("{% if add_generation_prompt %}go{% endif %}") == "go"
    assert render("{% if add_generation_prompt %}go{% endif %}", generate=False) == ""
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "a \\"quoted\\" <b>"}'
    # Lines that hold only a block leave nothing behind.
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("{% if tools is none %}no tools{% endif %}") == "no tools"


def test_a_template_may_refuse_messages() -> None:
    with pytest.raises(ConfigError, match="accept the messages; found: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'x' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_broken_and_hostile_templates_give_one_error(template: str) -> None:
    with pytest.raises(ModelFileError, match="chat template must"):
        render(template)


@pytest.mark.parametrize(
    "message", [{}, {"role": "user"}, {"role": 1, "content": "x"}, {"role": "user", "content": None}]
)
def test_messages_have_a_role_and_a_content(message: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a message has a role and a content"):
        render("{{ messages }}", [message])
