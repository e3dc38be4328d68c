r"""However a number is written, wherever it stands, it is read as itself or not at all.

Renderings of numbers are multiplied with the places where models write them, and so are
expressions that hold digits and are no number: those are never read as one.
"""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.tasks._numbers import number_text, plain
from grpo_jax.tasks.answers import last_number, marked_number, parse_number


def grouped(separator):
    return lambda v: f"{v:,}".replace(",", separator)


def translated(digits):
    table = str.maketrans("0123456789", digits)
    return lambda v: str(v).translate(table)


def scientific(pattern):
    """The number as 1.25 * 10^3; `pattern` takes the factor and the power."""
    return lambda v: pattern.format(*f"{v:.15e}".replace("+", "").split("e"))


# What must be read, from a whole number.
WHOLE = {
    "plain": str,
    "decimal": lambda v: f"{v}.0",
    "plus": lambda v: str(v) if v < 0 else f"+{v}",
    "minus sign": lambda v: str(v).replace("-", "\u2212"),
    "en dash": lambda v: str(v).replace("-", "\u2013"),
    "small minus": lambda v: str(v).replace("-", "\ufe63"),
    "comma": grouped(","),
    "comma and cents": lambda v: f"{v:,}.00",
    "LaTeX comma": grouped("{,}"),
    "LaTeX comma, tight": grouped(",\\!"),
    "LaTeX space": grouped("\\,"),
    "LaTeX tie": grouped("~"),
    "space": grouped(" "),
    "no-break space": grouped("\u00a0"),
    "narrow no-break space": grouped("\u202f"),
    "thin space": grouped("\u2009"),
    "HTML space": grouped("&nbsp;"),
    "apostrophe": grouped("'"),
    "typographic apostrophe": grouped("\u2019"),
    "underscore": grouped("_"),
    "zero-width space": grouped("\u200b"),
    "full width": translated("０１２３４５６７８９"),
    "bold of mathematics": translated("𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗"),
    "dollars": lambda v: f"${v:,}",
    "dollars inside the sign": lambda v: (
        f"{v:,}".replace("-", "-$") if v < 0 else f"${v}"
    ),
    "LaTeX dollars": lambda v: f"\\${v}",
    "euros": lambda v: f"\u20ac{v}",
    "euros behind": lambda v: f"{v} \u20ac",
    "currency code": lambda v: f"{v:,} USD",
    "currency code before": lambda v: f"EUR{v:,}" if v >= 0 else str(v),
    "percent": lambda v: f"{v}%",
    "LaTeX percent": lambda v: f"{v}\\%",
    "bold": lambda v: f"**{v}**",
    "code": lambda v: f"`{v}`",
    "mathematics": lambda v: f"${v}$",
    "brackets of mathematics": lambda v: f"\\({v}\\)",
    "boxed": lambda v: f"\\boxed{{{v}}}",
    "text in a box": lambda v: f"\\boxed{{\\text{{{v}}}}}",
    "bold in LaTeX": lambda v: f"\\mathbf{{{v}}}",
    "exponent": lambda v: f"{v:.15e}",
    "capital exponent": lambda v: f"{v:.15E}",
    "python's float": lambda v: repr(float(v)),
    "power of ten": scientific("{}*10^{}"),
    "power of ten, spaced": scientific("{} x 10^{}"),
    "power of ten, typeset": scientific("{} \u00d7 10^{}"),
    "power of ten in LaTeX": scientific("{} \\times 10^{{{}}}"),
    "fraction": lambda v: f"{3 * v}/3",
    "fraction in LaTeX": lambda v: f"\\frac{{{3 * v}}}{{3}}",
    "sign before the fraction": lambda v: (
        ("-" if v < 0 else "") + f"\\dfrac{{{abs(v)}}}1"
    ),
    "unit": lambda v: f"{v} apples",
    "short unit": lambda v: f"{v}cm",
    "unit with a power": lambda v: f"{v} m^2",
    "unit with a digit": lambda v: f"{v} m2",
    "unit with a raised digit": lambda v: f"{v} cm\u00b2",
    "unit in LaTeX": lambda v: f"{v}\\text{{ m/s}}",
    "unit in LaTeX with a power": lambda v: f"{v}\\,\\text{{ cm}}^{{2}}",
    "unit with a power in HTML": lambda v: f"{v} cm<sup>2</sup>",
    "grams": lambda v: f"{v}g",
    "liters": lambda v: f"{v}L",
    "speed": lambda v: f"{v}m/s",
    "HTML dollars": lambda v: f"&#36;{v}",
    "HTML minus": lambda v: f"{v}".replace("-", "&#8722;"),
    "underlined": lambda v: f"\\underline{{\\underline{{{v}}}}}",
    "colored": lambda v: f"\\textcolor{{red}}{{{v}}}",
    "line with a number": lambda v: f"{v} \\tag{{1}}",
    "line with a name": lambda v: f"{v}\\label{{eq:2}}",
    "line with space behind": lambda v: f"{v} \\\\[5pt]",
    "degrees": lambda v: f"{v}^\\circ",
}
# What need not be read, but never as another number.
HARD = {
    "detached minus": lambda v: f"{v}".replace("-", "- "),
    "minus in words": lambda v: f"{v}".replace("-", "minus "),
    "minus outside": lambda v: f"{v}".replace("-", "-\\text{") + ("}" if v < 0 else ""),
    "minus in mathematics": lambda v: f"{v}".replace("-", "$-$"),
    "space behind the comma": lambda v: f"{v:,}".replace(",", ", "),
    "LaTeX space behind the comma": lambda v: f"{v:,}".replace(",", ",\\,"),
    "HTML power of ten": lambda v: f"{v // 1000} x 10<sup>3</sup>" * (v % 1000 == 0),
    "points between groups": lambda v: (
        f"{v:,}".replace(",", ".") if abs(v) >= 10**6 else ""
    ),
    "decimal comma": lambda v: f"{v},0",
    "decimal comma of cents": lambda v: f"{v},00",
    "Indian groups": lambda v: f"{v // 1000},{v % 1000:03}" if v >= 10**6 else "",
    "another script": translated("٠١٢٣٤٥٦٧٨٩"),
    "thousands": lambda v: f"{v // 1000} thousand" if v % 1000 == 0 else "",
    "millions": lambda v: f"{v / 10**6} million",
    "millions, short": lambda v: f"${v / 10**6}M",
    "kilo": lambda v: f"{v / 1000}k",
    "ten thousands": lambda v: f"{v / 10**4}\u4e07",
    "code glued to it": lambda v: f"No{v:,}",
    "numpy": lambda v: f"{v:.0e}".replace("e", ".e") if abs(v) < 10 else "",
    "thirds": lambda v: f"{v}.000...",
    "factor": lambda v: f"2 * {v / 2}",
    "sum": lambda v: f"{v - 1} + 1",
    "root": lambda v: f"\\sqrt{{{v * v}}}" if v > 1 else "",
    "mixed scripts": lambda v: f"{v}".replace("1", "１"),
    "brackets": lambda v: f"({v:,})" if v >= 0 else "",
}
PLACES = [
    "{}",
    "{}.",
    "The answer is {}.",
    "The answer is: {}\n",
    "x = {}",
    "x={}",
    "Of 3 and 17 it is {}, as said",
    "1. Add.\n2. So: {}",
    "3 + 4 = 7, and then {}!",
    "\u7b54\u6848\u662f {}\u3002",
    "**Answer:** {}",
    "*Answer*\n\n{}\n\nI checked it." + " It holds." * 60,
    "{}" + " " * 400,
    "{}" + "!" * 299,
    '"{}"',
    "<answer>{}</answer>",
    "| total | {} |",
    "so \\text{{it is }} {} \\quad",
    "#### {}",
]
MARKED = ["#### {}", "so 12.\n####{}\nThat was easy.", "#### {}."]
numbers = st.one_of(
    st.integers(-20, 20),
    st.integers(-(10**7), 10**7),
    st.integers(0, 9999).map(lambda v: v * 1000),
    st.integers(-(10**15), 10**15),
)


def among(table):
    return st.sampled_from(sorted(table)).map(table.__getitem__)


def check_rendering(value, render):
    text = render(value)
    for place in PLACES:
        assert last_number(place.format(text)) == value, (place, text)
    for place in MARKED:
        assert marked_number(place.format(text)) == value, (place, text)


@pytest.mark.parametrize("name", WHOLE)
def test_every_rendering_is_read_at_every_place(name):
    for value in (-1234567, -12000, -5, 0, 7, 142, 1000, 10**6):
        check_rendering(value, WHOLE[name])


@settings(deadline=None, max_examples=50)
@given(numbers, among(WHOLE))
def test_every_number_is_read_in_every_rendering(value, render):
    check_rendering(value, render)


@settings(deadline=None, max_examples=300)
@given(numbers, among(HARD), st.sampled_from(PLACES + MARKED))
def test_what_is_hard_to_read_is_never_read_as_another_number(value, render, place):
    text = render(value)
    if text:
        for read in (last_number, marked_number, parse_number):
            assert read(place.format(text)) in (None, value), read


@settings(deadline=None)
@given(
    st.integers(-(10**6), 10**6),
    st.integers(1, 10**4),
    st.sampled_from(PLACES),
    st.sampled_from(
        ["{}/{}", "{} / {}", "{}\u2044{}", "\\frac{{{}}}{{{}}}", "\\tfrac{{{}}}{{{}}}"]
    ),
)
def test_fractions_are_read_exactly(top, bottom, place, form):
    assert last_number(place.format(form.format(top, bottom))) == Fraction(top, bottom)


@settings(deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 8),
    st.sampled_from(PLACES),
    st.sampled_from(["{} {}/9", "{}\\frac{{{}}}{{9}}", "{}\\frac{}9", "{} and {}/9"]),
)
def test_mixed_numbers_are_one_number(whole, top, place, form):
    value = whole + Fraction(top, 9)
    assert last_number(place.format(form.format(whole, top))) == value
    assert last_number(place.format("-" + form.format(whole, top))) == -value


NO_NUMBERS = [
    "(1,2)", "(3, 4)", "(3; 4)", "[3, 4)", "\\{3, 4\\}", "3,4", "34,5", "1,2,3", "1,23",
    "1,2345", "0,123", "3-4", "3\u20134", "3 - 4", "3 \u2212 4", "10:30", "3 : 2",
    "2024-01-05", "5/6/2023", "192.168.1.1", "1.234,50", "12 34", "5x", "5 + x", "5/x",
    "x - 5", "x-5", "f(x)-5", "2\\pi", "2\u03c0", "2 pi", "3\\sqrt{2}", "3\u221a2",
    "sqrt(2)", "\\sqrt[3]{5}", "\\log_2 8", "\\frac{\\pi}{2}", "\\frac{\\sqrt{2}}{2}",
    "\\frac{1}{\\sqrt{2}}", "\\frac{x+1}{2}", "\\frac{3}{4}x", "2^10", "2^{10}", "e^5",
    "(x+1)^2", "3 \\cdot x", "10 \\pm 2", "10 \u00b1 2", "5(x+1)", "1.8 million",
    "two hundred 50", "2 hundred and 50 thousand", "5k", "5m", "10h30", "0x1F", "GPT-4",
    "CO2", "version2", "x_1", "7 and a half", "0.333...", "0.(3)", "0.\\overline{3}",
    "1/0", "1e999", "10^{999}", "3!4", "3 4 5", "5'10\"", "6\u00d74", "6 x 4", "3**2",
    "(3)(4)", "\u0663", "3,4\u4e07",
    "(-\\infty, 3]", "(-\\infty,3)", "[3, \\infty)", "(3, \u221e)", "\\arctan 2",
    "arccos(1/2)", "\\tan^{-1} 2", "\\cot 2", "\\sinh 2", "5 (mod 7)", "5 \\bmod 7",
    "the square root of 2", "2 to the power of 10", "2 squared", "10 factorial",
    "$10!$", "\\boxed{10!}", "\\lfloor 3.5 \\rfloor", "\\langle 3, 4\\rangle",
    "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "{1 \\over 2}", "3\\colon 2",
    "12cm x 4cm", "2<sup>10</sup>", "H<sub>2</sub>O", "5g(x)", "5g + h",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_is_no_single_number_is_none(text):
    for place in PLACES + MARKED:
        assert last_number(place.format(text)) is None, place
        assert marked_number(place.format(text)) is None, place
    assert parse_number(text) is None


@settings(deadline=None)
@given(
    st.fractions(),
    st.integers(-300, 300).map(lambda power: Fraction(10) ** power),
)
def test_the_text_of_a_number_is_that_number(number, scale):
    for value in (number, scale, number * scale):
        assert parse_number(number_text(value)) == value
    assert number_text(Fraction(5, 2)) == "2.5" and number_text(Fraction(1, 3)) == "1/3"
    assert number_text(Fraction(10**20)) == "1" + "0" * 20


@settings(deadline=None)
@given(
    st.text(max_size=60)
    | st.text(alphabet="0123456789,.-+ ${}\\frac^*/'()e\u00bd\u2212\u00b2")
)
def test_any_text_is_read_without_an_exception(text):
    last_number(text), marked_number(text), parse_number(text)
    assert plain(plain(text)) == plain(text)


PARTED = [
    ", ",
    " and ",
    "; ",
    "\n",
    " = ",
    "=",
    " \u2192 ",
    " is ",
    ". ",
    " or ",
    "|",
    " (",
]


@settings(deadline=None, max_examples=300)
@given(numbers, among(WHOLE), numbers, among(WHOLE), st.sampled_from(PARTED))
def test_of_two_numbers_the_last_is_read_or_none(one, first, two, second, between):
    assert last_number(first(one) + between + second(two)) in (None, two)


def test_an_operator_far_away_counts_and_columns_stay_apart():
    for text in ("x -{}5", "x = -{}5", "minus{}5", "5{}million", "5{}000", "3 +{}5"):
        assert last_number(text.format(" " * 200)) is None, text
    assert last_number("5" + " " * 200 + "apples") == 5


def test_superscripts_and_vulgar_fractions_do_not_fuse_with_digits():
    assert plain("10\u207b\u00b3 x\u00b2") == "10^{-3} x^{2}"
    assert last_number("10\u207b\u00b3") == Fraction(1, 1000)
    assert last_number("3\u00bd") == Fraction(7, 2) == last_number("3 \u00bd")
    assert last_number("\u2212\u00bd") == Fraction(-1, 2)
