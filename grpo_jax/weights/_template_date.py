"""Chat templates that ask for today's date, with the date of another moment."""

import datetime
import json
import re

# A directive of `strftime`, with the flags that C libraries know.
_DIRECTIVE = re.compile(r"%[-_^#0]?[A-Za-z]")


def with_date(template: str, moment: datetime.datetime) -> str:
    """The template, in which `strftime_now` gives the date and time of a moment.

    transformers gives templates a `strftime_now` that reads the clock, and since
    version 5 lets nobody pass another function. A macro of the same name takes its
    place; it puts values where the directives stand that occur in the template.
    """
    if "strftime_now" not in template:
        return template
    naive = moment.replace(tzinfo=None)  # as the clock that it stands for
    values = {d: naive.strftime(d) for d in sorted(set(_DIRECTIVE.findall(template)))}
    replaced = "".join(
        f" | replace({json.dumps(directive)}, {json.dumps(value)})"
        for directive, value in values.items()
        if value != directive
    )
    macro = "{%- macro strftime_now(format) -%}{{- format"
    return f"{macro}{replaced} -}}}}{{%- endmacro -%}}{template}"
