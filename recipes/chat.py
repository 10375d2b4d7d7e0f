"""Chat templates: a conversation as the text that a model knows, made by its own template."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.convert.directory import read_json

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


def template(folder: Path) -> str:
    """The chat template beside a model. Raises ValueError where there is none."""
    if (folder / _FILE).is_file():
        try:
            return (folder / _FILE).read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{folder / _FILE} is no UTF-8 text; fetch it again") from None
    found: Any = None
    if (folder / _CONFIG).is_file():
        found = read_json(folder / _CONFIG).get("chat_template")
    if isinstance(found, list):  # Several by name.
        named = {item.get("name"): item.get("template") for item in found
                 if isinstance(item, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ValueError(f"{folder} has no chat template (neither {_FILE} nor one in {_CONFIG}); "
                         "leave --chat out, and write the prompt as the model was trained on it")
    return found


def render(text: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str]) -> str:
    """A conversation as text, up to where the model's answer begins.

    The template comes with the weights, and is not trusted: it runs in jinja's sandbox, where it
    reaches neither files nor Python's insides.

    Args:
      text: the template.
      messages: each with "role" and "content".
      special: spellings by name, as {"bos_token": "<s>"}.

    Raises:
      ValueError: jinja2 is missing, or the template is faulty or refuses the conversation.
    """
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError("--chat needs the library jinja2: pip install 'parazoo[hf]'") from None

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    class Generation(Extension):
        """{% generation %}, which some templates put around answers, to train on these alone."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[loopcontrols, Generation])
    room.filters["tojson"] = to_json
    room.globals |= {"raise_exception": refuse,
                     "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return room.from_string(text).render(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=True,
            **special)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
            RecursionError, TypeError, ValueError) as error:
        problem = str(error) or type(error).__name__
        raise ValueError(f"the chat template cannot be used: {problem}") from None
