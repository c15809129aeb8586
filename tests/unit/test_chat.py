from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from splitserve.chat import ChatTemplate
from splitserve.errors import CheckpointError, InvalidRequest

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Why?</b>"},
]

CHATML = """{% for message in messages %}
    {% generation %}
{{ '<|' + message.role + '|>' + message.content + eos_token }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""


def refused(source: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    (violation,) = caught.value.violations
    assert violation.field == "chat"
    assert "\n" not in violation.description
    return violation.description


def test_blocks_are_trimmed_and_tokens_known():
    template = ChatTemplate(CHATML, {"eos_token": "</s>"})
    text = "<|system|>Be brief.</s><|user|><b>Why?</b></s>"
    assert template.render(MESSAGES, add_generation_prompt=False).replace("\n", "") == text
    assert template.render(MESSAGES).endswith("<|assistant|>\n")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[1].content }}", "<b>Why?</b>"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ strftime_now('%d %b %Y') }}", "02 Jan 2030"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ missing }}", ""),
    ],
)
def test_conventions(source, text):
    template = ChatTemplate(source, {}, now=lambda: datetime(2030, 1, 2))
    assert template.render(MESSAGES) == text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "refused it: roles must alternate"),
        ("{{ messages[7].content }}", "refused it: list object has no element 7"),
        ("{{ 1 / (messages | length - 2) }}", "refused it: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% for i in range(10 ** 7) %}{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_templates_that_refuse_or_fail(source, expected):
    assert expected in refused(source)


def test_output_is_bounded():
    template = ChatTemplate("{% for i in range(99) %}0123456789{% endfor %}", {})
    assert len(template.render(MESSAGES)) == 990
    template = ChatTemplate(template.source, {}, max_output_chars=989)
    with pytest.raises(InvalidRequest, match="more than 989 characters"):
        template.render(MESSAGES)


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% nonsense %}", "{{" + "(" * 5000])
def test_templates_that_are_none(source):
    with pytest.raises(CheckpointError, match="chat template is not valid: ") as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert "\n" not in caught.value.message


def write(directory: Path, **config: object) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_sources_in_a_directory(tmp_path):
    assert ChatTemplate.from_checkpoint(tmp_path) is None
    assert ChatTemplate.from_checkpoint(write(tmp_path, add_bos_token=True)) is None

    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    write(tmp_path, chat_template="{{ bos_token }}{{ eos_token }}", **tokens)
    template = ChatTemplate.from_checkpoint(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "<s></s>"

    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    template = ChatTemplate.from_checkpoint(write(tmp_path, chat_template=named, **tokens))
    assert template is not None
    assert template.render(MESSAGES) == "d"

    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    template = ChatTemplate.from_checkpoint(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "file <s>"


@pytest.mark.parametrize("value", [3, [], [{"name": "tool_use", "template": "t"}], [7]])
def test_broken_sources(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
        ChatTemplate.from_checkpoint(write(tmp_path, chat_template=value))


@pytest.mark.model
def test_real_model(model_path):
    template = ChatTemplate.from_checkpoint(model_path)
    assert template is not None
    assert template.render(MESSAGES) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<b>Why?</b><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.model
@pytest.mark.slow
def test_real_model_equals_transformers(model_path):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(model_path.parent, gguf_file=model_path.name)
    template = ChatTemplate.from_checkpoint(model_path)
    assert template is not None
    for messages in (MESSAGES, MESSAGES[1:], [*MESSAGES, {"role": "assistant", "content": "é"}]):
        for opens in (True, False):
            expected = oracle.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opens
            )
            assert template.render(messages, add_generation_prompt=opens) == expected
