#!/usr/bin/env bash
# transformers 5.24.0.
#
# Expected: keyword arguments of `apply_chat_template` reach the template, so that one may
# replace what templates call by name: `strftime_now`, say, by which those of Llama 3 and
# others write today's date into the prompt. A text does arrive. A function arrives as the
# text "<function>", as does any object that is no plain data, and the call of it is a
# TypeError. So prompts change from one day to the next, and no argument stops it. A macro
# of that name, put before the template, does.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet transformers==5.24.0 jinja2==3.1.6
cat >"$place/program.py" <<'END'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
MESSAGES = [{"role": "user", "content": "a"}]
DATE = "{{ strftime_now('%Y') }}"
FIXED = "{% macro strftime_now(form) %}1999{% endmacro %}"


def render(template, **arguments):
    try:
        return tokenizer.apply_chat_template(
            MESSAGES, chat_template=template, tokenize=False, **arguments
        )
    except TypeError as error:
        return f"TypeError: {error}"


print("a text:    ", render("{{ today }}", today="1999"))
print("a function:", render("{{ today }}", today=lambda form: "1999"))
print("called:    ", render(DATE, strftime_now=lambda form: "1999"))
print("a macro:   ", render(FIXED + DATE))
END
"$place/venv/bin/python" "$place/program.py" 2>/dev/null | tee "$place/seen"
diff "$place/seen" - <<'END'
a text:     1999
a function: <function>
called:     TypeError: 'str' object is not callable
a macro:    1999
END
echo "as described"
