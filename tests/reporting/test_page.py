import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from grpo_jax.reporting import _run_files, metrics
from grpo_jax.reporting._panels import panels_of
from grpo_jax.reporting.page import write_report
from grpo_jax.reporting.text import escape_control_chars
from grpo_jax.reporting.trackers import _JsonlTracker

VOID = {"meta", "input", "br", "img", "link"}


class Page(html.parser.HTMLParser):
    """Tags, text by element, rows of completions, and whether all tags are closed."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], {}
        self.rows, self.paths, self.field = [], [], None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        attributes = dict(attrs)
        if tag == "article":
            self.rows.append({"rank": attributes["class"].removeprefix("row ")})
            self.rows[-1] |= {
                name: float(attributes[f"data-{name}"])
                for name in ("step", "reward", "length")
            }
        if tag == "div" and "turn " in (attributes.get("class") or ""):
            drawn = attributes["class"].split()[1] == "drawn"
            self.rows[-1].setdefault("turns", []).append([drawn])
        if tag == "pre":
            self.field = attributes.get("class")
        if tag == "path" and "stroke: var(--curve)" in attributes.get("style", ""):
            self.paths.append(attributes["d"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text.setdefault(tag, []).append(data)
        if tag == "pre" and self.field in ("prompt", "completion"):
            self.rows[-1][self.field] = data.removeprefix("\n")
        elif tag == "pre" and self.field is not None:
            self.rows[-1]["turns"][-1].append((self.field, data.removeprefix("\n")))


def _hostile_run(run_dir, synthetic):
    rows = [
        {
            "step": 1,
            "prompt": [{"role": "user", "content": text}],
            "completion": text,
            "rewards": {text: 1.0},
            "reward": float(index),
            "advantage": 0.0,
            "length": 3,
            "finished": True,
        }
        for index, text in enumerate(synthetic.HOSTILE[-4:])
    ]
    tracker = _JsonlTracker(run_dir)
    tracker.log({"reward": 1.0, synthetic.HOSTILE[3]: 2.0}, 1)
    tracker.log_completions(rows, 1)
    tracker.close()
    (run_dir / "config.yaml").write_text(f"task: {synthetic.HOSTILE[4]!r}\n")
    manifest = {
        "status": synthetic.HOSTILE[3],
        synthetic.HOSTILE[4]: [synthetic.HOSTILE[3], {"a": synthetic.HOSTILE[2]}],
    }
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    return run_dir


def test_a_page_that_cannot_be_written_is_reported_by_its_path(tmp_path, synthetic):
    run = _hostile_run(tmp_path / "run", synthetic)
    # A file in the way stops root as well, whom a read-only mount does not.
    page = run / "config.yaml" / "page.html"
    with pytest.raises(ValueError, match=f"{page} cannot be written .*--out"):
        write_report(run, page)


def test_hostile_text_stays_text(tmp_path, synthetic):
    page = Page(write_report(_hostile_run(tmp_path / "run", synthetic)))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    shown = {row["completion"] for row in page.rows}
    assert shown == {escape_control_chars(text) for text in synthetic.HOSTILE[-4:]}
    assert f"user: {escape_control_chars(synthetic.HOSTILE[3])}" in {
        row["prompt"] for row in page.rows
    }
    # The name of a metric is the title of its curve, the name of a reward a label.
    assert synthetic.HOSTILE[3] in page.text["text"]
    assert f"{synthetic.HOSTILE[4]} 1" in page.text["span"]
    source = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert not re.search(
        "[\x00-\x09\x0b-\x1f\u2028\u2029\u202a-\u202e\u2066-\u2069]", source
    )


def test_page_works_offline_and_runs_no_script_but_its_own(tmp_path, synthetic):
    page = Page(write_report(synthetic.write_run(tmp_path / "run", steps=20)))
    names = {name for name, _ in page.attributes}
    assert names.isdisjoint({"src", "href", "action", "srcset", "onload", "onclick"})
    # Curves repeat their markers by a reference within the page.
    links = [value for name, value in page.attributes if name == "xlink:href"]
    assert all(link.startswith("#") for link in links)
    contents = [value for name, value in page.attributes if name == "content"]
    policy = next(value for value in contents if "default-src" in value)
    assert policy.startswith("default-src 'none';")
    (nonce,) = [value for name, value in page.attributes if name == "nonce"]
    assert len(nonce) >= 16 and f"script-src 'nonce-{nonce}';" in policy
    style = "".join(page.text["style"])
    assert "@import" not in style and "url(" not in style


def test_a_nonce_is_used_for_one_page(tmp_path, synthetic):
    run = synthetic.write_run(tmp_path / "run", steps=1)
    nonces = {dict(Page(write_report(run)).attributes)["nonce"] for _ in range(2)}
    assert len(nonces) == 2


def _points(path):
    numbers = [float(text) for text in re.findall(r"-?[\d.]+", path)]
    return np.array(numbers).reshape(-1, 2).T


def test_page_holds_the_curve_of_every_metric(tmp_path, synthetic):
    run = synthetic.write_run(tmp_path / "run", steps=30)
    page = Page(write_report(run))
    history = metrics.read_metrics(run)
    names = list(dict.fromkeys(name for line in history for name in line))
    names.remove("step")
    panels = panels_of([history])
    others = [name for name in names if name not in {p.metric for p in panels}]
    assert len(panels) == 7 and len(others) == 3
    titles = [panel.title for panel in panels] + others
    assert [text for text in page.text["text"] if text in titles] == titles
    # Each curve in turn: its points are its steps and values on another scale.
    drawn = [_points(path) for path in page.paths if path.count("L") > 1]
    expected = [panel.metric for panel in panels] + others
    for name, (x, y) in zip(expected, drawn, strict=True):
        steps, values = _run_files.series(history, name)
        slope, offset = np.polyfit(steps, x, 1)
        assert slope > 0
        np.testing.assert_allclose(offset + slope * np.array(steps), x, atol=0.01)
        if name == "time/rollout":  # is always the same
            assert len(set(y)) == 1
            continue
        slope, offset = np.polyfit(values, y, 1)
        assert slope < 0  # SVG counts from the top
        np.testing.assert_allclose(offset + slope * np.array(values), y, atol=0.01)


def test_page_holds_the_best_and_worst_of_each_step(tmp_path, synthetic):
    run = synthetic.write_run(tmp_path / "run", steps=40)
    rows = Page(write_report(run)).rows
    assert [row["step"] for row in rows[::4]] == [40, 30, 20, 10]
    for step in (10, 20, 30, 40):
        rewards = sorted(
            row["reward"] for row in _run_files.read_completions(run, step)
        )
        shown = [row for row in rows if row["step"] == step]
        ranks = {"best": rewards[:-3:-1], "worst": rewards[1::-1]}
        for rank, expected in ranks.items():
            got = [row["reward"] for row in shown if row["rank"] == rank]
            assert got == expected


def test_a_completion_has_its_rewards_its_length_and_how_it_ended(tmp_path):
    row = {
        "step": 3,
        "prompt": "p",
        "completion": "\n c",
        "length": 7,
        "reward": 1500.25,
    }
    row |= {"rewards": {"right": 0.123456, "style": None}, "advantage": -0.5}
    row |= {"finished": False}
    tracker = _JsonlTracker(tmp_path)
    tracker.log({"reward": 1.0}, 3)
    tracker.log_completions([row], 3)
    tracker.close()
    page = Page(write_report(tmp_path))
    assert page.text["b"] == ["step 3 · best · reward 1,500"]
    facts = "right 0.123, style none, advantage -0.5, 7 tokens, cut at the limit"
    assert page.text["span"][-5:] == facts.split(", ")
    assert page.rows[0]["completion"] == "\n c"  # the first line break is shown too


def _page_of(folder, rows):
    tracker = _JsonlTracker(folder)
    tracker.log({"reward": 1.0}, 1)
    tracker.log_completions(rows, 1)
    tracker.close()
    return Page(write_report(folder))


def test_a_conversation_is_shown_turn_by_turn_with_what_was_masked(tmp_path, synthetic):
    page = _page_of(tmp_path, [synthetic.talk(text=synthetic.HOSTILE[3])])
    assert page.rows[0]["prompt"] == "user: What is 417 * 23?"
    first = [("text", "I ask."), ("call", 'calculate(expression="417*23")')]
    assert page.rows[0]["turns"] == [
        [True, *first, ("call", 'calculate(expression="1/0")')],
        [False, ("text", synthetic.HOSTILE[3])],
        [False, ("text", "{'error': 'by zero'}")],
        [True, ("text", "It is 9591.")],
    ]
    roles = ["assistant", "tool calculate", "tool calculate", "assistant"]
    assert page.text["b"][1:] == roles
    # Each masked turn says so, and the legend what it means.
    assert sum("masked" in text for text in page.text["span"]) == 3
    assert [text for text in page.text["span"] if text.startswith("drawn by")]
    facts = "right 1|12 tokens drawn|2 turns|2 calls|1 failed".replace(
        "right", "correct"
    )
    assert set(facts.split("|")) <= set(page.text["span"])


def test_runs_may_mix_texts_and_conversations_and_old_rows_look_as_ever(
    tmp_path, synthetic
):
    old = {"step": 1, "prompt": "p", "rewards": {}, "length": 1, "finished": True}
    # A column that a reward function logged before there were episodes.
    old |= {"completion": "old", "reward": 0.0, "advantage": 0.0, "turns": "north"}
    answered = old | {"completion": "a\nb", "reward": -1.0, "turns": 2}
    page = _page_of(tmp_path, [synthetic.talk(), old, answered])
    kinds = [("turns" in row, row.get("completion")) for row in page.rows]
    assert kinds == [(True, None), (False, "old"), (False, "a\nb")]
    assert page.text["span"].count("1 tokens") == 1  # of the row without episodes
    assert "text of the environment within, which is masked" in page.text["span"]


def test_a_page_without_conversations_needs_no_legend(tmp_path, synthetic):
    page = Page(write_report(synthetic.write_run(tmp_path / "run", steps=10)))
    assert not [text for text in page.text["span"] if text.startswith("drawn by")]


def test_a_long_conversation_is_cut_and_says_what_is_left_out(tmp_path, synthetic):
    row = synthetic.talk()
    row["completion"][1] = row["completion"][1] | {"content": "x" * 9000}
    page = _page_of(tmp_path, [row])
    *_, (drawn, (kind, text)) = page.rows[0]["turns"]
    assert (len(page.rows[0]["turns"]), drawn, kind) == (2, False, "text")
    # 6 characters, and two calls of 30 and 27, came before.
    assert text == "x" * (8000 - 63) + f"\n... [{1000 + 63} more characters]"
    assert "... 2 more messages" in page.text["p"]


def test_what_happened_to_an_episode_is_told(tmp_path, synthetic):
    row = synthetic.talk() | {"dropped_answers": True, "turns": 1, "failed_calls": 0}
    told = _page_of(tmp_path, [row]).text["span"]
    assert {"1 turn", "2 calls", "the last answer did not fit"} <= set(told)
    assert not [text for text in told if text.endswith("failed")]


def test_summary_and_tables_show_what_the_run_directory_says(tmp_path, synthetic):
    page = Page(write_report(synthetic.write_run(tmp_path / "run", steps=40)))
    assert page.text["strong"][0] == "10.0% → 85.0%"
    assert page.text["strong"][2:4] == ["40", "3m23s"]
    assert "kl_coef: 0.04" in page.text["pre"][-1]
    assert "0.10.2" in page.text["td"]


def test_run_without_evaluations_completions_or_other_files_has_a_page(
    tmp_path, synthetic
):
    run = synthetic.write_run(
        tmp_path / "run", steps=1, evaluations=False, completions=False
    )
    for name in ("config.yaml", "manifest.json", "summary.json"):
        (run / name).unlink()
    page = Page(write_report(run, tmp_path / "elsewhere" / "page.html"))
    assert page.rows == [] and "eval/accuracy" not in page.text["text"]
    assert "running" in page.text["span"]


def test_a_run_without_any_number_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl": null}\n')
    assert "svg" not in Page(write_report(tmp_path)).tags


def test_completions_without_reward_are_left_out_and_none_is_shown_twice(tmp_path):
    base = {"step": 1, "prompt": "p", "rewards": {}, "length": 1, "finished": True}
    rows = [
        base | {"completion": text, "reward": reward, "advantage": 0.0}
        for text, reward in zip("abccd", [1.0, None, 2.0, 2.0, 0.0], strict=True)
    ]
    tracker = _JsonlTracker(tmp_path)
    tracker.log({"reward": 1.0}, 1)
    tracker.log_completions(rows, 1)
    tracker.close()
    shown = Page(write_report(tmp_path)).rows
    assert [(row["completion"], row["rank"]) for row in shown] == [
        ("c", "best"),
        ("a", "best"),
        ("d", "worst"),
    ]


def test_long_runs_and_texts_are_thinned_and_say_so(tmp_path):
    row = {"prompt": "p", "rewards": {}, "length": 1, "finished": True, "reward": 1.0}
    tracker = _JsonlTracker(tmp_path)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 5001):
            file.write(f'{{"step": {step}, "kl": {step / 2}}}\n')
    for step in range(1, 301):
        text = "x" * 9000 if step == 1 else "y"
        path = _run_files.completions_file(tmp_path, step)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row | {"step": step, "completion": text}) + "\n")
    tracker.close()
    path = write_report(tmp_path)
    page = Page(path)
    kept = [row["step"] for row in page.rows]
    assert len(kept) == 250 and kept[0] == 300 and kept[-1] == 1
    assert page.rows[-1]["completion"].endswith("x\n... [1000 more characters]")
    assert any("of 300 written" in text for text in page.text["p"])
    # A straight line is not drawn by its 5000 points, in either of its two panels.
    assert max(path.count("L") for path in page.paths) < 100


# Reports into the page's title, so that one start of the browser answers it all.
_CHECKS = """
const field = (name, value) => {
  filters.elements[name].value = value;
  filters.dispatchEvent(new Event("input"));
  return [...document.querySelectorAll(".row")].map((row) =>
    row.querySelector("b").textContent.match(/step (\\d+) . (\\w+) . reward (\\S+)/));
};
const said = {};
const shown = () => list.children.length;
said.all = shown();
said.steps = field("from", "20").map((m) => Number(m[1]));
field("from", "");
said.best = field("rank", "best").map((m) => m[2]);
said.rising = field("sort", "reward").map((m) => Number(m[3]));
field("rank", "row");
said.low = field("low", "1").map((m) => Number(m[3]));
field("low", "");
said.found = field("text", "<SCRIPT>").length;
said.text = document.querySelector("pre.completion").textContent;
said.prompts = field("text", "WHAT IS").length;
field("text", "no such text");
said.none = document.getElementById("count").textContent;
said.talk = field("text", "by zero").length;
said.turns = document.querySelectorAll("article .turn.given").length;
said.curves = [...document.querySelectorAll("svg path")].filter((path) =>
  path.getBoundingClientRect().width > 100).length;
document.title = "checked " + JSON.stringify(said);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_page_in_a_browser_draws_filters_and_runs_nothing_hostile(tmp_path, synthetic):
    run = synthetic.write_run(tmp_path / "run", steps=40)
    file = _run_files.completions_file(run, 10)
    file.write_text(file.read_text() + json.dumps(synthetic.talk(reward=9.0)) + "\n")
    path = write_report(run)
    source = path.read_text(encoding="utf-8")
    # The checks become part of the page's one script, which the policy allows.
    source = source.replace("</script>\n</body>", _CHECKS + "</script>\n</body>")
    path.write_text(source, encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run"
    options += " --disable-background-networking --disable-component-update"
    options += f" --disable-sync --user-data-dir={tmp_path / 'browser'}"
    command = ["chromium", *options.split(), "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=600, check=True)
    dom = done.stdout.decode("utf-8")
    title = re.search("<title>(.*?)</title>", dom)[1]
    assert title.startswith("checked "), title
    said = json.loads(html.unescape(title.removeprefix("checked ")))
    assert said["curves"] >= 7
    assert said["all"] == 16  # two best and two worst at steps 10, 20, 30, 40
    assert set(said["steps"]) == {20, 30, 40}
    assert set(said["best"]) == {"best"} and len(said["best"]) == 8
    assert said["rising"] == sorted(said["rising"])
    assert said["low"] and min(said["low"]) >= 1
    assert said["found"] == 1
    assert said["text"] == synthetic.HOSTILE[3]
    assert said["prompts"] == 16
    assert (said["talk"], said["turns"]) == (1, 2)
    assert said["none"] == "0 of 16"
