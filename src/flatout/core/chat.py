"""Chat messages -> prompt text, by the jinja2 template that ships with a model.

The template comes from the model file, so it runs in jinja2's immutable sandbox, with the options, globals
and filters that templates written for transformers rely on.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flatout.core.files import shown
from flatout.errors import ConfigError, ModelFileError


class _Refused(Exception):
    """The template's own raise_exception()."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes HTML characters, which would change the prompt.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError) as error:
        raise ModelFileError(
            "the chat template must be valid jinja2", shown(str(error), 200), "a model with a sound template"
        ) from error


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], *, generate: bool, bos: str, eos: str
) -> str:
    """The prompt for `messages`, each with "role" and "content"; `generate` opens the assistant's turn.

    Raises ConfigError for messages that are malformed or that the template refuses, ModelFileError when the
    template itself fails.
    """
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ConfigError(
                "a message has a role and a content, both text", shown(dict(message)), "role: user"
            )
    from jinja2 import TemplateError

    try:
        text: str = _compiled(template).render(
            messages=[dict(m) for m in messages],
            add_generation_prompt=generate,
            bos_token=bos,
            eos_token=eos,
            tools=None,
            documents=None,
        )
    except _Refused as error:
        raise ConfigError(
            "the model's chat template must accept the messages",
            shown(str(error), 200),
            "another order of roles",
        ) from error
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ModelFileError(
            "the chat template must render", shown(str(error), 200), "a model with a sound template"
        ) from error
    return text
