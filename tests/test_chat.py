# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Conversations and instructions for fine-tuning: the text is the chat template's, and the loss is on answers alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from finetuning import write_lines

from galore_jax.training.chat import ChatTemplate, load_chat_template
from galore_jax.training.examples import NO_LOSS, load_examples
from galore_jax.training.tokenizer import ByteTokenizer, load_tokenizer

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
]
WRITTEN = (
    "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    "<|im_start|>user\nAnd 3+3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n"
)


def load(tmp_path, rows, template=None, tokenizer=None, **settings):
    file = write_lines(tmp_path / "a.jsonl", rows)
    chat = None if template is None else ChatTemplate(template, "the template", {"eos_token": "<|endoftext|>"})
    sizes = {"batch": 1, "seq": 400, "seed": 0, "eos": 256} | settings
    return load_examples(str(file), str(file), tokenizer or ByteTokenizer(), chat=chat, **sizes)[0].examples


def learnt(example):
    """The tokens on which there is loss, in pieces."""
    pieces, before = [], False
    for target in example.targets.tolist():
        if target != NO_LOSS:
            pieces = [*pieces[:-1], [*pieces[-1], target]] if before else [*pieces, [target]]
        before = target != NO_LOSS
    return pieces


def marked():
    """A tokenizer that has ChatML's marks as special tokens."""
    tokenizer = tokenizers.Tokenizer.from_str(load_tokenizer("bpe", ["one two"], vocab_size=257)._tokenizer.to_str())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


# What is learnt


def test_every_answer_of_a_conversation_is_learnt_with_its_end_and_nothing_else(tmp_path):
    marked().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    (example,) = load(tmp_path, [{"messages": CHAT}], CHATML, tokenizer)
    whole = [*example.tokens.tolist(), example.targets[-1]]
    theirs = marked().encode(WRITTEN, add_special_tokens=False)
    assert whole == theirs.ids
    start, end = (tokenizer._tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    assert (whole.count(start), whole.count(end)) == (5, 5)
    newline = tokenizer.encode("\n").tolist()
    assert learnt(example) == [[*tokenizer.encode(answer).tolist(), end, *newline] for answer in ("4", "6")]
    # In a text of any other kind they are letters.
    assert end not in tokenizer.encode("<|im_end|>")


def test_a_template_without_a_mark_for_the_end_gets_the_end_of_a_document(tmp_path):
    template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    (example,) = load(tmp_path, [{"messages": CHAT[1:]}], template)
    assert [bytes(i for i in piece if i < 256) for piece in learnt(example)] == [b"4", b"6"]
    assert learnt(example)[-1] == [ord("6"), 256]
    assert bytes(example.tokens.tolist()) == b"[u]2+2?[a]4[u]And 3+3?[a]6"
    with_mark = template.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    )
    (example,) = load(tmp_path, [{"messages": CHAT[1:]}], with_mark)
    assert learnt(example) == [[ord("4"), 256], [ord("6"), 256]]


def test_an_answer_that_the_template_writes_otherwise_in_the_middle_has_no_loss(tmp_path):
    """As templates do that drop the thoughts of all answers but the last."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}{think}{% endif %}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (example,) = load(tmp_path, [{"messages": CHAT[1:]}], template)
    assert [bytes(i for i in piece if i < 256) for piece in learnt(example)] == [b"{think}6"]


def test_marks_of_answers_in_a_template_write_nothing():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{%- endgeneration -%} | {% endfor %}"
    assert ChatTemplate(source, "a", {}).render(CHAT[2:], ask=False) == "4| And 3+3?| 6| "


def test_instructions_are_conversations_where_there_is_a_template_and_headings_where_not(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "output": "ho"},
    ]
    examples = load(tmp_path, rows)
    assert [bytes(e.tokens.tolist()).decode() for e in examples] == [
        "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n4",
        "### Instruction:\nSay hi.\n\n### Response:\nhi",
        "### Instruction:\nSay ho.\n\n### Response:\nho",
    ]
    assert [learnt(e) for e in examples] == [[[*b"4", 256]], [[*b"hi", 256]], [[*b"ho", 256]]]
    examples = load(tmp_path, rows, CHATML)
    assert bytes(examples[0].tokens.tolist()).startswith(
        b"<|im_start|>user\nAdd.\n\n2, 2<|im_end|>\n<|im_start|>assistant\n4"
    )
    assert bytes(examples[1].tokens.tolist()).startswith(b"<|im_start|>user\nSay hi.<|im_end|>\n")


def test_a_long_conversation_loses_its_end(tmp_path):
    (example,) = load(tmp_path, [{"messages": CHAT}], CHATML, seq=130)
    assert (example.tokens.size, example.cut) == (130, True)
    assert bytes(example.tokens.tolist()) == WRITTEN[:130].encode()


def test_jinja_as_transformers_runs_it(tmp_path):
    """The template's file counts more than the field, and special tokens may be objects; texts are those of transformers."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "field {{ eos_token }}", "eos_token": {"content": "</s>"}, "bos_token": None})
    )
    assert load_chat_template(tmp_path).render(CHAT, ask=False) == "field </s>"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert load_chat_template(tmp_path).render(CHAT, ask=False) == "d"
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    template = load_chat_template(tmp_path)
    assert template.render(CHAT, ask=False) == WRITTEN
    assert template.render(CHAT, ask=True) == WRITTEN + "<|im_start|>assistant\n"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    assert load_chat_template(tmp_path) is None


# Mistakes


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ({"messages": CHAT}, None, "line 1 has messages, and the folder of --model has no chat template"),
        ({"messages": []}, CHATML, 'line 1 has "messages" that are no list with a message in it'),
        ({"messages": "hi"}, CHATML, 'line 1 has "messages" that are no list with a message in it'),
        ({"messages": [{"role": "user"}]}, CHATML, 'must have a "role" and a "content", both strings'),
        ({"messages": [{"role": "user", "content": ["parts"]}]}, CHATML, 'must have a "role" and a "content"'),
        ({"messages": CHAT[:2]}, CHATML, "line 1 has no message of the assistant that"),
        ({"messages": CHAT}, "{% for", "the template is not a chat template ("),
        ({"messages": CHAT}, "{{ raise_exception('roles must alternate') }}", "(roles must alternate)."),
        ({"messages": CHAT}, "{{ messages.nothing.there }}", "the template cannot write the conversation ("),
        ({"instruction": "a", "input": 3, "output": "b"}, None, 'line 1 has "input": 3, which must be a string'),
        ({"instruction": "a", "output": None}, None, 'line 1 has "output": null, which must be a string'),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row, template, says, tmp_path):
    with pytest.raises(ValueError, match=r"\.$") as caught:
        load(tmp_path, [row], template)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_of_the_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged"):
        load_chat_template(tmp_path)


def test_the_names_of_special_tokens_stand_for_them_only_where_they_are_meant_to():
    tokenizer = ByteTokenizer()
    np.testing.assert_array_equal(tokenizer.encode_marked("a<|endoftext|><|endoftext|>b"), [97, 256, 256, 98])
    assert 256 not in tokenizer.encode("a<|endoftext|>b")
