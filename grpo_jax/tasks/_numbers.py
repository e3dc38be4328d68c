r"""Reads numbers in text of a model or a data set: exactly, or not at all.

Digits and the signs that join them (`1/2`, `10:30`, `2*10^3`) are one expression. An
expression has no value if it is not a single number, or if it is a part of a larger
one (`5x`, `\sqrt{2}`, `1.8 million`). Text is read and never evaluated, values are
exact, and every pattern takes time linear in the text.
"""

import functools
import html
import re
import unicodedata
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact
from fractions import Fraction

# Numbers of more digits, or larger powers of ten, are not read: they take memory.
_MOST_DIGITS = 400
_LONGEST = 1000  # characters of an expression; `number_text` writes no longer ones
# Characters beside an expression that may show it to be part of a larger one.
_CONTEXT = 80

# --- Characters: one form of each sign, space and digit -------------------------------

_DASHES = dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")
_QUOTES = dict.fromkeys("\u2018\u2019\u02bc", "'") | dict.fromkeys("\u201c\u201d", '"')
_FIXED = _DASHES | _QUOTES | {"\u2044": "/", "\u2215": "/"}
_SUPERSCRIPTS = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u207b]+")
_VULGAR = "\u00bc-\u00be\u2150-\u215e\u2189"
# Unicode variants of a character with the same meaning; superscripts have another.
_SAME = ("<wide>", "<narrow>", "<small>", "<font>", "<noBreak>", "<compat>")


def plain(text: str) -> str:
    """The text with one form for each typographic variant, ASCII if there is one.

    Minus signs, quotes, spaces, full-width and mathematical letters and digits become
    those of a keyboard. `x²` becomes `x^{2}`, and `3½` becomes `3 1/2`. Invisible
    characters are removed.
    """
    if text.isascii():
        return text
    text = _SUPERSCRIPTS.sub(
        lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text
    )
    text = re.sub(rf"(?<=\d)(?=[{_VULGAR}])", " ", text)
    return re.sub(r"[^\x00-\x7f]", lambda found: _plain(found[0]), text)


@functools.lru_cache(maxsize=4096)
def _plain(character: str) -> str:
    if character in _FIXED:
        return _FIXED[character]
    category = unicodedata.category(character)
    if category == "Zs":
        return " "
    if category == "Cf":
        return ""
    form = unicodedata.decomposition(character).partition(" ")[0]
    if form == "<fraction>":
        return unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    if form in _SAME and category not in ("No", "Nl"):  # circled numbers stay
        return unicodedata.normalize("NFKC", character)
    return character


# --- LaTeX: typesetting around numbers is removed -------------------------------------

_END = r"(?![A-Za-z])"
_LATEX = [
    # Not text: the space after a line, tags, labels, colors.
    (re.compile(r"\\\\\[-?[\d.]{1,6} ?[a-z]{2}\]"), r"\\\\"),
    (
        re.compile(r"\\(?:tag|label|[hv]space|(?:text)?color)\*?\{[^{}\n]{0,40}\}"),
        " ",
    ),
    (re.compile(r"<sup>([^<>\n]{1,40})</sup>"), r"^{\1}"),
    (re.compile(r"<sub>([^<>\n]{1,40})</sub>"), r"_{\1}"),
    (re.compile(r"\\!|(?<=,)\{\}"), ""),
    (re.compile(r"\{(?:\\,|,)\}"), ","),
    (re.compile(rf"\^\{{?\\circ{_END}\}}?|\\degree{_END}"), "\u00b0"),
    (re.compile(rf"\\(?:times|cdot){_END}|[\u00d7\u00b7\u22c5\u2219]"), "*"),
    (re.compile(rf"\\div{_END}|\u00f7"), "/"),
    (re.compile(rf"\\pm{_END}"), "\u00b1"),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (
        re.compile(
            r"\\[,;:> ]|~|\\[()\[\]]|\\(?:left|right|boxed|fbox|mbox|bm|boldsymbol|"
            r"underline|emph|[lL]arge|displaystyle|q?quad|"
            r"(?:math|text)(?:bf|it|rm|sf|tt|normal)?)" + _END
        ),
        " ",
    ),
    (re.compile(r"\{[ \t]+(?=\{)"), "{"),
    # Two spaces remain, so that two columns, or an operator apart from its number, can
    # still be recognized.
    (re.compile(r"[ \t]{3,}"), "  "),
]
_ENTITY = re.compile(r"&#?[A-Za-z0-9]{2,8};")


def typeset(text: str) -> str:
    """The text without typesetting of numbers by Unicode, HTML and LaTeX."""
    text = plain(_ENTITY.sub(lambda found: html.unescape(found[0]), text))
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


# --- Expressions: digits, and all that is joined to them -----------------------------

# Letters of scripts that put spaces between words. Digits after other letters, such as
# Chinese ones, are an expression of their own.
_L = "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0370-\u052f"
_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
_CODE = r"(?:USD|EUR|GBP|CHF|INR|JPY|CNY|RMB|US|Rs\.?)(?=[\d$])"
_ATOM = rf"""(?:
    (?: \d++(?:\.\d++)*+ | (?<![\d.])\.\d++ ) (?:\.?[eE][-+]?\d++(?![{_L}\d]))?+
  | \\[dtc]?frac[ ]*(?:\{{[^{{}}\n]*+\}}|\d)[ ]*(?:\{{[^{{}}\n]*+\}}|\d)
)"""
# Between two atoms of one expression: punctuation without spaces, spaces alone, or an
# operator between spaces. Relations, bars and marks of headings separate expressions.
_GLUE = r"(?:[^\w\s=<>|#\u2190-\u21ff\u2248\u2260\u2264\u2265]{1,8}|_)"
_JOIN = rf"""(?:
    {_GLUE}
  | [ \t]++
  | [)}}\]$]{{0,3}}[ \t]*+[-+*/^xX\u00b1]{{1,2}}[ \t]*+[({{[$]{{0,3}}[-+]?
  | [ \t]++:[ \t]++
  | [ \t]++and[ \t]++(?=\d++/\d|\\[dtc]?frac)
  | (?=\\[dtc]?frac)
)"""
_UNIT = rf"""[ \t]*+\{{?[ \t]*+(?:[{_L}]++[/*])*+
    (?: (?:[ms]|[{_L}]{{2,12}})\}}?\^\{{?-?\d\}}? | (?:m|[{_L}]{{2,12}})[23] )
    (?![{_L}\d_]|[.,*/^-]\d)"""
_EXPRESSION = re.compile(
    rf"""
    (?<![{_L}\d])(?<![{_L}\d]_)
    (?:[{_CURRENCY}*_{{`]{{0,4}}(?P<sign>[-+]))?
    (?P<wrap>(?:[{_CURRENCY}][ ]?|[*_({{}}`]|{_CODE}){{0,6}})
    (?P<body>{_ATOM}(?:{_JOIN}{_ATOM})*+)
    (?:{_UNIT})?+
    | [{_L}]_?\d++(?:{_GLUE}\d++|[ ]\d{{3}}(?!\d))*+  # CO2, x_1: a name
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Expression:
    """Digits in a text and what joins them; `value` is None if it is not a number."""

    value: Fraction | None
    end: int  # behind the last digit, that of a unit such as `m^2` included
    bare: bool  # without such a unit, and without a bracket before the digits


def expression_at(text: str, position: int) -> Expression | None:
    """The expression that begins at a position of a `typeset` text, or None."""
    found = _EXPRESSION.match(text, position)
    return None if found is None else _expression(found)


def last_expression(text: str) -> Expression | None:
    """The last expression of a `typeset` text, or None."""
    last = None
    for found in _EXPRESSION.finditer(text):
        last = found
    return None if last is None else _expression(last)


def _expression(found: re.Match[str]) -> Expression:
    body = found["body"]
    value = None
    if body is not None and not _is_part(found):
        value = _value(body)
    if value is not None and found["sign"] == "-":
        value = -value
    bare = "(" not in (found["wrap"] or "") and found.end() == found.end("body")
    return Expression(value, found.end(), bare)


# --- Parts of larger expressions ------------------------------------------------------

_SCALES = (
    "hundreds?|thousands?|millions?|billions?|trillions?|dozens?|lakhs?|crores?"
    "|bn|mn|mln|bln|tn"
)
_FUNCTIONS = "sqrt|cbrt|log|ln|exp|(?:arc)?(?:sin|cos|tan)h?|binom"
_INFINITY = r"(?:\\infty|\u221e)"
_WRAP = rf"[{_CURRENCY}*_(\[{{}}`]*"
_BEFORE = re.compile(
    rf"""(?:
        [-+/^\u00b1\u2213\u221a\u221b][ \t]*{_WRAP}  # an operator
      | [{_L}\d)}}\]]\*+ | [{_L}\d)}}\]][ \t]+[*x][ \t]+
      | [\^_][({{]+
      | \}}\{{+ | \\[A-Za-z]+[ ]*(?:\[[^\[\]]*\])?\{{+  # a command's argument
      | (?<![{_L}])(?:minus|negative|{_SCALES})[ \t]*{_WRAP}[ \t]*
      | (?<![{_L}])(?:{_FUNCTIONS}|sec|csc|cot|b?mod|roots?[ ]of|power[ ]of)
        (?:_\{{?\w{{1,4}}\}}?|\^\{{?-?\d\}}?)?[ \t]*{_WRAP}[ \t]*
      | \\(?:over|colon)[ ]* | {_INFINITY}[ ]*,[ ]*
    )\Z""",
    re.VERBOSE | re.IGNORECASE,
)
_AFTER = re.compile(
    rf"""
        # 5x, 5k, 5m: a letter may stand for anything; grams and liters are plain.
        [)}}$]*(?!(?-i:[gL](?![{_L}]|[ ]*[-+*/^(=])|m/s))[{_L}](?![{_L}])
      | [ \t]*[)}}$*_]*[ \t]*\{{?[ \t]*
        (?:{_SCALES}|{_FUNCTIONS}|pi|squared|cubed|factorial)(?![{_L}])
      | [)}}$]*[\^(] | [)}}$]*[ ]?[\u03c0\u221a\u221b\u221e\u03b8]
      | [ \t]*[)}}$]*[ \t]*[-+*/^][ \t]*[({{]*(?:[{_L}](?![{_L}])|[\\\u221a\u03c0(])
      | [ \t]*[)}}]*[ \t]*\\(?:pi|theta|infty|pm|mp|over|{_FUNCTIONS}){_END}
      | [ \t]*\\(?:rangle|rfloor|rceil){_END} | \s*\\end\{{.?matrix\}}
      | [ ]*,[ ]*[-+]?{_INFINITY} | ![}}$]
      | [ \t]+and[ \t]+(?:a[ \t]+|one[ \t]+)?(?:half|quarter|third)(?![{_L}])
      | [\u0300-\u036f] | \\overline
      | [ ]?[\u5341\u767e\u5343\u4e07\u842c\u5104\u4ebf\u5146]  # ten to 10^12
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LISTED = re.compile(r"\d[)}\]$*]*[ \t]*[,;]\s+\Z")
# Three digits after a comma and a space: "18, 000" is one number, "12, 345" may be.
_ZEROS = re.compile(r"0\d\d(?!\d)")
_GROUP_BEFORE = re.compile(r"(?<![\d.])\d{1,3},[ \t]+\Z")
_GROUP = re.compile(r"\d{3}(?!\d)")
_LIST_ENDS = re.compile(r"[ \t$*]*\\?[)\]}]")


def _is_part(found: re.Match[str]) -> bool:
    """Whether the text beside an expression makes it a part of a larger one."""
    text, (start, end) = found.string, found.span("body")
    if found["sign"]:
        start = found.start("sign")
    before, after = text[max(0, start - _CONTEXT) : start], text[end : end + _CONTEXT]
    if found["sign"] and before.endswith((")", "]", "}")):  # f(x)-5
        return True
    if _BEFORE.search(before) or _AFTER.match(after):
        return True
    if "." in found["body"] and after.startswith(".."):  # 0.333...
        return True
    if not _LISTED.search(before):
        return False
    if _LIST_ENDS.match(after) or _ZEROS.match(found["body"]):  # (3, 4)
        return True
    return bool(_GROUP_BEFORE.search(before) and _GROUP.match(found["body"]))


# --- Values ---------------------------------------------------------------------------

# Commas, spaces, apostrophes and underscores between groups of three, one kind each.
_GROUPED = r"[1-9]\d{0,2}([,\ '_])\d{3}(?:\1\d{3})*"
_TOO_LARGE = 10**_MOST_DIGITS
_DECIMAL = re.compile(rf"(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+", re.ASCII)
_SCIENTIFIC = re.compile(
    r"(?P<factor>.*?)(?:\.?[eE](?P<e>[-+]?\d+)"
    r"|(?:^|\ ?[*x]\ ?)10(?:\^|\*\*)[({]*(?P<power>[-+]?\d+))",
    re.ASCII,
)
_FRACTION = re.compile(
    r"(?:(?P<whole>\d+)(?:\ and)?(?:\ (?=\d{1,2}/)|\ ?(?=\\)))?"
    r"(?:(?P<top>[^\ /\\]+)\ ?/\ ?(?P<bottom>[^\ /\\]+)"
    r"|\\[dtc]?frac\ ?(?P<over>\{[^{}]*\}|\d)\ ?(?P<under>\{[^{}]*\}|\d))",
    re.ASCII,
)


def _value(body: str) -> Fraction | None:
    """The number that an expression is, or None."""
    value = _exact(body) if len(body) <= _LONGEST else None
    if value is None or max(abs(value.numerator), value.denominator) >= _TOO_LARGE:
        return None
    return value


def _exact(body: str) -> Fraction | None:
    if (found := _FRACTION.fullmatch(body)) is not None:
        return _ratio(found)
    if (found := _SCIENTIFIC.fullmatch(body)) is not None:
        factor = Fraction(1) if not found["factor"] else _decimal(found["factor"])
        power = int(found["e"] or found["power"])
        if factor is None or abs(power) > _MOST_DIGITS:
            return None
        return factor * Fraction(10) ** power
    return _decimal(body)


def _ratio(found: re.Match[str]) -> Fraction | None:
    top = _signed(found["top"] or found["over"].strip("{}"))
    bottom = _signed(found["bottom"] or found["under"].strip("{}"))
    if top is None or not bottom:
        return None
    whole = found["whole"]
    if whole is None:
        return top / bottom
    # 3 1/2 is a mixed number; 3 5/2 and 3 -1/2 are not.
    return int(whole) + top / bottom if 0 < top < bottom else None


def _signed(text: str) -> Fraction | None:
    text = text.strip()
    value = _decimal(text.removeprefix("-"))
    return -value if value is not None and text.startswith("-") else value


def _decimal(text: str) -> Fraction | None:
    if not _DECIMAL.fullmatch(text):
        return None
    return Fraction(re.sub(r"[, '_]", "", text))


def number_text(number: Fraction) -> str:
    """The number as text, equal for equal numbers: a decimal if it terminates."""
    exact = Context(prec=_MOST_DIGITS, traps=[Inexact])
    try:
        quotient = exact.divide(Decimal(number.numerator), Decimal(number.denominator))
    except Inexact:
        return str(number)
    return f"{quotient:f}"
