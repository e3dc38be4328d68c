"""The template of the report page is harmless; its style and script fit its markup."""

import pathlib
import re

import pytest

from grpo_jax.reporting import page

ASSETS = pathlib.Path(page.__file__).parents[1] / "assets"
PAGE = (ASSETS / "report.html").read_text(encoding="utf-8")
(STYLE,) = re.findall(r"<style>(.*?)</style>", PAGE, re.DOTALL)
(SCRIPT,) = re.findall(r"<script[^>]*>(.*?)</script>", PAGE, re.DOTALL)


def test_only_the_curves_are_not_escaped():
    assert set(re.findall(r"(\w+) \| safe", PAGE)) == {"curves", "other_curves"}
    assert "autoescape" not in PAGE and "{{" not in STYLE + SCRIPT


@pytest.mark.parametrize("asset", [STYLE, SCRIPT])
def test_it_ends_no_element_early_and_works_offline(asset):
    assert "</" not in asset and "<!--" not in asset
    assert not re.search(r"https?:|//\w+\.|@import|url\(|fetch\(|XMLHttp", asset)


def test_no_text_is_read_as_markup_or_code():
    assert not re.search(
        r"\.(inner|outer)HTML|insertAdjacent|document\.write|eval\(|Function\(",
        SCRIPT,
    )


def test_every_color_is_there_by_day_and_by_night():
    day, night = re.findall(r":root \{([^}]*)\}", STYLE)
    defined = [set(re.findall(r"(--\w+):", colors)) for colors in (day, night)]
    assert defined[0] == defined[1] == set(re.findall(r"var\((--\w+)\)", STYLE))
    assert "--curve" in defined[0]  # which the curves name


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
