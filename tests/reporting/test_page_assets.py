"""What is written into the report as it is: harmless, and at one with the page."""

import pathlib
import re

import pytest

from grpo_jax.reporting import page
from grpo_jax.reporting.page_assets import SCRIPT, STYLE

PAGE = pathlib.Path(page.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("asset", [STYLE, SCRIPT])
def test_it_ends_no_element_early_and_asks_nothing_of_the_network(asset):
    assert "</" not in asset and "<!--" not in asset
    # The name of SVG is no address that is asked for.
    asked = asset.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.|@import|url\(|fetch\(|XMLHttp", asked)


def test_no_text_is_read_as_markup_or_code():
    assert not re.search(
        r"\.(inner|outer)HTML|insertAdjacent|document\.write|eval\(|Function\(",
        SCRIPT,
    )


def test_every_color_is_there_by_day_and_by_night():
    day, night = re.findall(r":root \{([^}]*)\}", STYLE)
    defined = [set(re.findall(r"(--\w+):", colors)) for colors in (day, night)]
    assert defined[0] == defined[1] == set(re.findall(r"var\((--\w+)\)", STYLE))


def test_the_script_finds_what_the_page_has():
    wanted = set(re.findall(r'getElementById\("(\w+)"\)', SCRIPT))
    assert wanted and wanted <= set(re.findall(r'id="(\w+)"', PAGE))
    fields = set(re.findall(r'field\("(\w+)"\)', SCRIPT))
    assert fields and fields == set(re.findall(r' name="(\w+)"', PAGE)) - {"viewport"}


def test_every_bracket_is_closed():
    pairs = {")": "(", "]": "[", "}": "{"}
    for asset in (STYLE, SCRIPT):
        bare = re.sub(r'"(\\.|[^"\\])*"|//.*', "", asset)
        stack = []
        for sign in re.findall(r"[()\[\]{}]", bare):
            if sign in pairs:
                assert stack.pop() == pairs[sign]
            else:
                stack.append(sign)
        assert not stack
