"""Chat templates, from either place, run where they can do no harm."""

import json

import pytest

from recipes import chat

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>"
          "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MESSAGES = [{"role": "user", "content": " Hi {{ 7*7 }} "}]


def test_a_conversation():
    assert chat.render(CHATML, MESSAGES, {}) == (
        "<|im_start|>user\nHi {{ 7*7 }}<|im_end|>\n<|im_start|>assistant\n")
    assert chat.render("{{ bos_token }}{{ messages[0] | tojson }}", MESSAGES,
                       {"bos_token": "<s>"}).startswith('<s>{"role": "user"')
    marked = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}!{% endfor %}"
    assert chat.render(marked, MESSAGES, {}) == "user!"
    assert chat.render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", MESSAGES, {}) == (
        '{"a": 2, "b": 1}')
    # As transformers has it, they are there, and nothing.
    assert chat.render("{{ tools is none and documents is none }}", MESSAGES, {}) == "True"


def test_where_a_template_is(tmp_path):
    with pytest.raises(ValueError, match="no chat template.*leave --chat out"):
        chat.template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [
        {"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]}))
    assert chat.template(tmp_path) == "b"
    config.write_text(json.dumps({"chat_template": "c"}))
    assert chat.template(tmp_path) == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert chat.template(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="no UTF-8"):
        chat.template(tmp_path)


@pytest.mark.parametrize(("template", "message"), [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe|immutable|not safely callable"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% if %}", "Expected an expression"),
    ("{{ 1 // 0 }}", "zero"),
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
])
def test_faulty_and_hostile_templates(template, message):
    with pytest.raises(ValueError, match=f"chat template cannot be used.*({message})"):
        chat.render(template, MESSAGES, {})
