"""A chat template that writes today's date writes that of the run, on any day."""

import copy
import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.weights._template_date import with_date
from grpo_jax.weights.tokenizer import Tokenizer

MOMENT = datetime.datetime(2024, 2, 9, 7, 5, 3, tzinfo=datetime.UTC)
MESSAGES = "{%- for m in messages %}[{{ m['content'] }}]{% endfor -%}"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def tokenizer_of(tiny_policy):
    def make(template):
        fast = copy.deepcopy(tiny_policy.tokenizer._fast)
        fast.chat_template = template
        return Tokenizer(fast)

    return make


def text_of(tokenizer, messages=USER):
    return tokenizer.decode(tokenizer.encode_prompt(messages))


@given(
    moment=st.datetimes(min_value=datetime.datetime(1900, 1, 1)),
    parts=st.lists(
        st.sampled_from(
            [*(f"%{d}" for d in "dbBYmyHMSpAaIjUx"), "%-d", "%-m", " ", ", ", "-", "T"]
        ),
        min_size=1,
    ),
)
def test_any_format_gives_the_moment(moment, parts):
    import jinja2

    form = "".join(parts)
    for template in (
        f'{{{{ strftime_now("{form}") }}}}',
        f"{{%- set form = '{form}' %}}{{{{ strftime_now(form) }}}}",
        f"{{{{ strftime_now(format='{form}') }}}}",
    ):
        made = jinja2.Environment().from_string(with_date(template, moment))
        assert made.render() == moment.strftime(form)


@pytest.mark.parametrize(
    "template",
    [
        '{{- "Today: " + strftime_now("%d %b %Y") + "\\n" }}' + MESSAGES,
        "{%- if not date is defined %}{%- if strftime_now is defined %}"
        '{%- set date = strftime_now("%d %b %Y") %}{%- else %}'
        '{%- set date = "26 Jul 2024" %}{%- endif %}{%- endif %}'
        '{{- "Today: " + date + "\\n" }}' + MESSAGES,
        '{%- macro head() %}Today: {{ strftime_now("%d %b %Y") }}\n{% endmacro -%}'
        "{{ head() }}" + MESSAGES,
    ],
)
def test_the_date_is_that_of_the_run_and_else_of_today(tokenizer_of, template):
    plain = tokenizer_of(template)
    dated = plain.dated(MOMENT)
    assert text_of(dated) == "Today: 09 Feb 2024\n[hi]"
    # The clock's day may change between two calls; that of a run does not.
    assert "2024" not in text_of(plain) and text_of(plain).endswith("[hi]")


def test_what_a_message_says_stays(tokenizer_of, tmp_path):
    dated = tokenizer_of('{{ strftime_now("%d") }}' + MESSAGES).dated(MOMENT)
    said = [{"role": "user", "content": "%d %Y strftime_now"}]
    assert text_of(dated, said) == "09[%d %Y strftime_now]"
    # An export holds the model's own template.
    dated.save(tmp_path)
    assert "macro" not in (tmp_path / "chat_template.jinja").read_text()


def test_without_a_date_nothing_changes(tokenizer_of, tiny_policy):
    template = tokenizer_of(MESSAGES)
    assert with_date(MESSAGES, MOMENT) == MESSAGES
    assert text_of(template.dated(MOMENT)) == text_of(template)
    bare = tiny_policy.tokenizer
    assert bare.dated(MOMENT) is bare
