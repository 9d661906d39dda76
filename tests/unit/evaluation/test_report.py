from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedrec.errors import RunError
from fedrec.evaluation import plots, report
from fedrec.evaluation import words as wording
from fedrec.random import Key

METRICS = ("ndcg@10", "hr@10", "recall@10", "mrr@10", "coverage@10", "novelty@10")


def a_group(n: int, ndcg: float, reach: float) -> dict[str, Any]:
    """Metrics in the proportions that MovieLens runs show."""

    def around(value: float, width: float) -> dict[str, float]:
        return {"value": value, "low": max(0.0, value - width), "high": value + width}

    whole = {"value": min(1.0, ndcg * 4.1), "low": None, "high": None}
    return {
        "n": n,
        "metrics": {
            "ndcg@10": around(ndcg, reach),
            "hr@10": around(2.6 * ndcg, 2.2 * reach),
            "recall@10": around(0.7 * ndcg, 0.8 * reach),
            "mrr@10": around(1.4 * ndcg, 1.5 * reach),
            "coverage@10": whole,
            "novelty@10": {"value": 6.0 + 10 * ndcg, "low": None, "high": None},
        },
    }


def a_release(index: int, draws: Any, one: bool) -> dict[str, Any]:
    levels = {
        "release": 0.071 + 0.004 * index,
        "previous": 0.066 + 0.003 * index,
        "popularity": 0.052,
        "local_only": 0.03,
    }
    if index == 0:
        levels.pop("previous")
    rows: dict[str, Any] = {}
    for row, usual in levels.items():
        level = usual + float(draws.normal(0, 0.002))
        rows[row] = {"all": a_group(290 + 14 * index, level, 0.011)}
        if not one:
            rows[row]["returning"] = a_group(180 + 20 * index, level * 1.15, 0.013)
            rows[row]["new"] = a_group(110 - 6 * index, level * 0.8, 0.017)
            rows[row]["new_items"] = a_group(60, level * (0.25 if row != "local_only" else 0.05), 0.009)
    differences = {
        row: {
            metric: {"value": d, "low": d - 0.009, "high": d + 0.009}
            for metric in ("ndcg@10", "hr@10")
            if (d := rows["release"]["all"]["metrics"][metric]["value"] - rows[row]["all"]["metrics"][metric]["value"])
        }
        for row in rows
        if row != "release"
    }
    start = None if one else 874_724_710 + index * 5_000_000
    return {
        "version": index + 1,
        "slice": index,
        "digest": f"{index + 1}" * 64,
        "parent": f"{index}" * 64 if index else None,
        "promoted": True,
        "n_items": 1500 + 45 * index,
        "train_rows": 60_000 if index == 0 else 8_000,
        "train_start": start,
        "train_end": None if start is None else start + 5_000_000,
        "test_end": None if start is None else start + 10_000_000,
        "rounds": 200 if index == 0 else 40,
        "seconds": 40.2 if index == 0 else 9.1,
        "bytes_down": 123_456_789,
        "bytes_up": 103_456_789,
        "epsilon": None,
        "rows": rows,
        "differences": differences,
    }


def a_document(slices: int = 4) -> dict[str, Any]:
    """A run as `fedrec simulate` reports it: made-up numbers of a plausible size, the same on each call."""
    draws = Key.from_seed(7).child("report").numpy()
    one = slices == 1
    rounds: list[dict[str, Any]] = []
    for index in range(slices):
        for r in range(200 if index == 0 else 40):
            refused = [{"node": "3", "reason": "tensor 'item' holds a NaN"}] if r in (17, 30) else []
            clients = 128 - int(draws.binomial(128, 0.04)) - 2 * len(refused)
            rounds.append(
                {
                    "slice": index,
                    "round": r,
                    "task": "fit",
                    "loss": 6.2 + 1.2 * math.exp(-(r + 60 * index) / 50) + float(draws.normal(0, 0.03)),
                    "cohort": 128,
                    "clients": clients,
                    "refused": refused,
                    "bytes_down": 440_000 + 6_000 * index,
                    "bytes_up": 3_400 * clients,
                    "seconds": 0.2 + float(draws.gamma(2.0, 0.02)) + (0.9 if r == 0 else 0.0),
                    "update_norm": 0.2,
                }
            )
        task = {"slice": index, "round": len(rounds), "task": "evaluate", "loss": None, "cohort": 300, "clients": 296}
        rounds.append(task | {"refused": [], "bytes_down": 2_000_000, "bytes_up": 40_000, "seconds": 0.8})
    return {
        "fedrec": "0.1.0",
        "name": "quickstart",
        "run": "quickstart/001",
        "command": "fedrec simulate",
        "complete": True,
        "experiment": {
            "name": "quickstart",
            "seed": 7,
            "data": {"kind": "movielens", "name": "ml-100k", "min_user": 5, "path": None},
            "model": {"kind": "transformer", "dim": 64, "layers": 2, "dropout": 0.1},
            "server": {"rounds": 200, "cohort": 128, "optimizer": {"kind": "adam", "lr": 0.003, "betas": [0.9, 0.99]}},
        },
        "experiment_digest": "ab" * 32,
        "machine": {
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64",
            "cpus": 2,
            "torch": "2.8.0+cpu",
            "flwr": "1.41.0",
            "threads": 2,
        },
        "data": {
            "name": "ml-100k",
            "n_users": 943,
            "n_items": 1682,
            "n_interactions": 100_000,
            "digest": "cd" * 32,
            "catalog_digest": "ef" * 32,
            "cleaning": {"rows_in": 100_021, "rows_out": 100_000, "dropped": {"duplicate": 20, "no_time": 1}},
            "terms": "GroupLens: research use, no redistribution without permission.",
        },
        "protocol": "All interactions are cut by global time into a base of 60 %, three equal slices and a tail. Each "
        "release is tested on the slice after it, before anything is trained on that slice. Items that a person has "
        "already seen are masked; all other items of the catalogue are ranked, none are sampled.",
        "privacy": {
            "statement": "Not private: no noise is added; the server sees the sum of the clients' updates.",
            "epsilon": None,
            "delta": None,
            "unit": "user",
        },
        "releases": [a_release(i, draws, one) for i in range(slices)],
        "rounds": rounds,
        "totals": {
            "seconds": 100.0,
            "bytes_down": sum(r["bytes_down"] for r in rounds),
            "bytes_up": sum(r["bytes_up"] for r in rounds),
            "epsilon": None,
            "rounds": len(rounds),
        },
    }


class Page(HTMLParser):
    """Tags, ids and text of a page, and whether every tag is closed by its own."""

    VOID = ("meta", "br", "hr", "link", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def with_difference(document: dict[str, Any], value: float, low: float | None, high: float | None) -> dict[str, Any]:
    document["releases"][-1]["differences"]["popularity"]["ndcg@10"] = {"value": value, "low": low, "high": high}
    return document


def table_of(document: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    report.print_table(document, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawings, which take most of the time, where a test is about the rest of the page."""
    monkeypatch.setattr(plots, "draw_all", lambda document: [])


@pytest.fixture(scope="module")
def html() -> str:
    return report.render_html(a_document())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_has_every_part(html: str, page: Page) -> None:
    assert [attrs["id"] for attrs in page.named("figure")] == [
        "plot-quality",
        "plot-groups",
        "plot-loss",
        "plot-traffic",
        "plot-answers",
        "plot-seconds",
    ]
    assert len(page.named("figcaption")) == 6
    found = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert found[:4] == ["How it was tested", "The run in pictures", "Releases", "Rounds"]
    assert found[4:] == ["Data", "Machine", "Experiment", "How to repeat it"]
    for fact in ("100,021", "Dropped: no time", "GroupLens: research use", "Linux-6.1-x86_64", "ab" * 32, "1998-07-06"):
        assert fact in page.text
    assert "fedrec simulate" in page.text
    assert '[server.optimizer] kind = "adam" lr = 0.003 betas = [0.9, 0.99]' in page.text
    assert len(page.named("details")) == 5  # four releases and the experiment
    assert sum("open" in attrs for attrs in page.named("details")) == 1


def test_the_metrics_table_shows_value_and_interval(html: str) -> None:
    own = a_document()["releases"][-1]["rows"]["release"]["returning"]["metrics"]["hr@10"]
    shown = f"<td>{own['value']:.3f}<small>[{own['low']:.3f}, {own['high']:.3f}]</small>".replace("0.", ".")
    assert shown in " ".join(html.split())


def test_refusals_are_added_up_by_node_and_reason(html: str) -> None:
    flat = " ".join(html.split())
    reason = '<td class="words wrap">tensor &#39;item&#39; holds a NaN</td>'
    assert f'<th scope="row">3</th>{reason}<td>8</td><td>18 to 314</td>' in flat


@pytest.mark.usefixtures("undrawn")
def test_too_many_kinds_of_refusals_are_counted_instead_of_listed() -> None:
    document = a_document(1)
    document["rounds"][0]["refused"] = [{"node": str(n), "reason": "late"} for n in range(60)]
    page = Page(report.render_html(document))
    assert "And 11 more kinds" in page.text  # 60 nodes and the two NaN replies of node 3, as one kind, less 50


def test_the_page_loads_and_runs_nothing(html: str, page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "a"}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not re.search(r"@import|url\((?!#)", html)
    links = {value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")}
    assert links
    assert all(str(link).startswith("#") for link in links)


def test_ids_are_unique_and_every_reference_has_its_target(html: str, page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)
    assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(ids)


def test_tables_and_drawings_are_named_for_screen_readers(page: Page) -> None:
    assert all(attrs.get("scope") in ("col", "row", "rowgroup") for attrs in page.named("th"))
    drawings = page.named("svg")
    assert [attrs["role"] for attrs in drawings] == ["img"] * 6
    last = a_document()["releases"][-1]["rows"]["release"]["all"]["metrics"]["ndcg@10"]["value"]
    assert f"NDCG@10 of release 4: release {wording.score(last)}" in str(drawings[0]["aria-label"])
    assert page.named("html")[0]["lang"] == "en"


def test_the_same_document_gives_the_same_bytes_whatever_the_settings_of_matplotlib(html: str) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert report.render_html(a_document()) == html
        assert mpl.rcParams["font.size"] == 30


def test_every_drawing_is_wellformed_xml_with_real_text(html: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawn) == 6
    for svg in drawn:
        words = "".join(ET.fromstring(svg).itertext())
        assert "Slice" in words or "Round, counted over the run" in words
    quality = "".join(ET.fromstring(drawn[0]).itertext())
    assert all(name in quality for name in ("previous release", "popularity", "local only", "NDCG@10", "HR@10"))
    assert all(color.lower() in drawn[0] for _, color, _ in wording.ROWS.values())


def test_a_single_release_is_drawn_with_its_values() -> None:
    document = a_document(1)
    drawn = {plot.name: plot for plot in plots.draw_all(document)}
    assert "groups" not in drawn  # only everyone was measured
    words = "".join(ET.fromstring(drawn["quality"].svg).itertext())
    for groups in document["releases"][0]["rows"].values():
        assert wording.score(groups["all"]["metrics"]["ndcg@10"]["value"]) in words


def test_every_word_of_the_document_is_escaped() -> None:
    evil = "<script>alert('$x_$')</script>"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                f"{key}{evil}" if key in ("duplicate", "cpus", "model") else key: poisoned(v)
                for key, v in value.items()
            }
        if isinstance(value, list):
            return [poisoned(v) for v in value]
        return evil if isinstance(value, str) else value

    document = poisoned(a_document(2))
    for release in document["releases"]:
        release["rows"][evil] = copy.deepcopy(release["rows"]["popularity"])
        release["differences"][evil] = copy.deepcopy(release["differences"]["popularity"])
        release["rows"]["release"]["all"]["metrics"][evil] = {"value": 0.5, "low": None, "high": None}
    html = report.render_html(document)
    assert "<script" not in html
    page = Page(html)
    assert not page.named("script")
    assert page.text.count("<script>") > 20
    assert "<script>" in table_of(document, width=200)


def test_rich_markup_in_names_is_printed_as_it_is() -> None:
    document = a_document(1)
    document["releases"][0]["rows"]["[red]mine[/red]"] = document["releases"][0]["rows"]["popularity"]
    document["privacy"]["statement"] = "Not private [bold]at all[/bold]."
    printed = table_of(document, width=120)
    assert "[red]mine[/red]" in printed
    assert "Not private [bold]at all[/bold]." in printed


def test_the_verdict_says_better_where_the_interval_is_above_zero() -> None:
    said = report.verdict(with_difference(a_document(), 0.029, 0.021, 0.037))
    own = a_document()["releases"][-1]["rows"]["release"]["all"]["metrics"]["ndcg@10"]
    assert said.outcome == "better"
    assert said.headline == "Better than popularity"
    assert f"Release 4 reaches NDCG@10 {report.interval(own)} on the test of slice 3 over 332 people." in said.text
    assert "the difference is .029 [.021, .037]: the release is better." in said.text
    assert (
        "Against popularity over 4 tested slices, the releases are better on 4, unclear on 0, worse on 0." in said.text
    )


def test_the_verdict_does_not_claim_what_the_interval_leaves_open() -> None:
    said = report.verdict(with_difference(a_document(), 0.029, -0.001, 0.059))
    assert said.outcome == "unclear"
    assert said.headline == "No clear difference from popularity"
    assert "[\N{MINUS SIGN}.001, .059]: zero is within it, so these data do not show which is better." in said.text
    assert "better on 3, unclear on 1, worse on 0" in said.text


def test_the_verdict_says_worse_in_plain_words() -> None:
    said = report.verdict(with_difference(a_document(), -0.02, -0.03, -0.01))
    assert said.outcome == "worse"
    assert said.headline == "Worse than popularity"
    worse = "the difference is \N{MINUS SIGN}.020 [\N{MINUS SIGN}.030, \N{MINUS SIGN}.010]: the release is worse."
    assert worse in said.text


def test_a_difference_without_an_interval_is_no_proof() -> None:
    said = report.verdict(with_difference(a_document(), 0.3, None, None))
    assert said.outcome == "unclear"
    assert "the difference is .300, and how sure that is was not measured." in said.text


@pytest.mark.parametrize(
    ("popularity", "outcome", "words"),
    [
        ((0.02, 0.01, 0.03), "better", "its interval lies wholly below"),
        ((0.06, 0.05, 0.065), "unclear", "the intervals are missing or overlap"),
        ((0.2, 0.19, 0.21), "worse", "its interval lies wholly above"),
        ((0.02, None, None), "unclear", "the intervals are missing or overlap"),
    ],
)
def test_without_paired_differences_overlapping_intervals_decide(
    popularity: tuple[float, float | None, float | None], outcome: str, words: str
) -> None:
    document = a_document(1)
    release = document["releases"][0]
    release["differences"] = {}
    release["rows"]["release"]["all"]["metrics"]["ndcg@10"] = {"value": 0.07, "low": 0.06, "high": 0.08}
    cell = dict(zip(("value", "low", "high"), popularity, strict=True))
    release["rows"]["popularity"]["all"]["metrics"]["ndcg@10"] = cell
    said = report.verdict(document)
    assert said.outcome == outcome
    assert words in said.text
    assert said.text.endswith("Brackets hold 95% intervals.")
    assert "slice" not in said.text  # one release: there is no stream to speak of


def test_the_verdict_tells_when_the_release_was_not_promoted() -> None:
    document = a_document()
    document["releases"][-1]["promoted"] = False
    assert "Release 4 was not promoted, so an earlier one stays in use." in report.verdict(document).text


@pytest.mark.usefixtures("undrawn")
def test_an_unfinished_run_says_so_everywhere() -> None:
    document = a_document(2) | {"complete": False}
    assert "This run is not complete" in Page(report.render_html(document)).text
    assert report.verdict(document).text.startswith("The run is not complete")
    assert "Not complete." in table_of(document)
    assert "not complete" not in Page(report.render_html(a_document(2))).text


def test_a_run_that_stopped_before_its_first_release_still_gives_a_page() -> None:
    document = a_document(1) | {"complete": False, "releases": []}
    page = Page(report.render_html(document))
    assert "Nothing to judge yet" in page.text
    assert "Releases" not in page.text
    assert "plot-loss" in {attrs["id"] for attrs in page.named("figure")}
    assert "No release has been tested yet." in table_of(document)


def test_the_page_stands_without_any_optional_part() -> None:
    page = Page(report.render_html({}))
    assert "Nothing to judge yet" in page.text
    assert "Not private No privacy statement was recorded" in page.text
    assert not page.named("figure")
    assert "Not private: no privacy statement was recorded." in table_of({})


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("part", sorted(set(a_document(1)) - {"releases"}))
def test_each_part_may_be_missing_or_none(part: str) -> None:
    document = a_document(1)
    document["rounds"] = document["rounds"][:3]
    document[part] = None if part != "complete" else True
    with_none = report.render_html(document)
    del document[part]
    assert report.render_html(document) == with_none
    assert "Better than popularity" in with_none


def test_cells_without_numbers_are_dashes_not_faults() -> None:
    document = a_document(2)
    for release in document["releases"]:
        release.update(
            dict.fromkeys(("train_rows", "seconds", "bytes_down", "bytes_up", "rounds", "train_end", "test_end"))
        )
        release["rows"]["popularity"]["new"] = {"n": 0, "metrics": {"ndcg@10": dict.fromkeys(("value", "low", "high"))}}
        del release["rows"]["local_only"]["new_items"]
    for r in document["rounds"]:
        r.update(dict.fromkeys(("loss", "seconds", "update_norm")))
    page = Page(report.render_html(document))
    assert [attrs["id"] for attrs in page.named("figure")] == [
        "plot-quality",
        "plot-groups",
        "plot-traffic",
        "plot-answers",
    ]
    assert "\N{EN DASH}" in page.text
    assert table_of(document)


@pytest.mark.usefixtures("undrawn")
def test_privacy_is_claimed_only_with_an_epsilon(page: Page) -> None:
    boxes = {attrs.get("id"): attrs["class"] for attrs in page.named("section") if "id" in attrs}
    assert boxes["privacy"] == "box public"
    assert "Not private Not private: no noise is added;" in page.text
    document = a_document(1)
    document["privacy"] = {"statement": "The server adds noise.", "epsilon": 2.0, "delta": 1e-6, "unit": "user"}
    private = Page(report.render_html(document))
    assert "Differentially private: \u03b5 = 2, \u03b4 = 1.0e-06, per user The server adds noise." in private.text
    assert "Not private" not in private.text


@pytest.mark.usefixtures("undrawn")
def test_write_report_leaves_two_whole_files_and_nothing_else(tmp_path: Path) -> None:
    document = a_document(1)
    path = report.write_report(document, tmp_path / "runs" / "001")
    assert path == tmp_path / "runs" / "001" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    assert path.read_text(encoding="utf-8") == report.render_html(document)
    assert json.loads((path.parent / "report.json").read_text(encoding="utf-8")) == document


@pytest.mark.usefixtures("undrawn")
def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    document = a_document(1)
    document["rounds"][0]["loss"] = math.nan
    document["releases"][0]["rows"]["release"]["all"]["metrics"]["hr@10"]["high"] = math.inf
    page = report.write_report(document, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["rounds"][0]["loss"] is None
    assert found["releases"][0]["rows"]["release"]["all"]["metrics"]["hr@10"]["high"] is None
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page.read_text(), flags=re.DOTALL).lower().replace(
        "holds a nan", ""
    )


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_fails_leaves_the_old_one_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = report.write_report(a_document(1), tmp_path)
    before = page.read_bytes()

    def broken(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", broken)
    with pytest.raises(RunError, match=r"Cannot write '.*report\.json': No space left on device; choose a folder"):
        report.write_report(a_document(2), tmp_path)
    assert page.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_folder_that_is_a_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(
        RunError, match=r"Cannot write '.*taken.report\.json': .*; choose a folder that can be written\."
    ):
        report.write_report(a_document(1), tmp_path / "taken")


def test_a_missing_library_is_named_and_the_numbers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RunError, match=r"needs jinja2; install it with `pip install 'fedrec\[sim\]'`"):
        report.write_report(a_document(1), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_experiment_block_is_toml_that_reads_back() -> None:
    config = {
        "name": 'a "quoted" \\ name',
        "none": None,
        "model": {"dim": 32, "deep": {"on": True, "lr": 1e-05}, "empty": {}},
        "only": {"tables": {"x": [1, 2]}},
        "list": [{"a": 1, "b": None}, {"a": 2}],
        "odd key": {"\u00fcber": "\u00e9\U0001f600"},
    }
    expected = copy.deepcopy(config)
    del expected["none"]
    expected["list"] = [{"a": 1}, {"a": 2}]
    assert tomllib.loads(report.toml(config)) == expected


def test_the_terminal_table_has_a_line_per_release_and_recommender() -> None:
    document = a_document()
    printed = table_of(document)
    lines = [line for line in printed.splitlines() if re.match(r"\s+\d", line)]
    assert len(lines) == 3 + 3 * 4
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed  # everything fits a terminal of 80 columns
    last = document["releases"][-1]["rows"]["release"]["all"]["metrics"]
    shown = [
        report.interval(last["ndcg@10"]),
        *(wording.score(last[m]["value"]) for m in METRICS if m not in ("ndcg@10", "mrr@10", "novelty@10")),
    ]
    assert lines[-4].split() == ["4", "3", "release", "332", *" ".join(shown).split(), "9", "226.9"]
    assert lines[-3].split()[:4] == ["4", "3", "previous", "332"]
    ends = " ".join(printed.split())
    assert "324 rounds, 1 min 40 s, 150 MB down, 134 MB up. Not private: no noise is added; the server sees" in ends


def test_the_release_rows_stand_out_on_a_colour_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", legacy_windows=False)
    report.print_table(a_document(1), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "\x1b[1;36m" in next(line for line in lines if "release" in line)
    assert "\x1b[1;36m" not in next(line for line in lines if "popularity" in line)


def test_metrics_at_another_depth_are_found() -> None:
    document = json.loads(json.dumps(a_document(1)).replace("@10", "@20"))
    assert "NDCG@20" in table_of(document)
    assert "reaches NDCG@20" in report.verdict(document).text
    document["rounds"] = []
    assert [plot.name for plot in plots.draw_all(document)] == ["quality"]


def test_a_recommender_without_a_given_colour_gets_one_of_its_own() -> None:
    document = a_document(1)
    for release in document["releases"]:
        release["rows"] |= dict.fromkeys(("gain in $ and $", "central_model"), release["rows"]["popularity"])
    document["rounds"] = []
    quality = plots.draw_all(document)[0]
    assert ">central model<" in quality.svg
    assert ">gain in $ and $<" in quality.svg  # not read as mathematics
    assert all(color.lower() in quality.svg for color, _ in plots.SPARE[:2])


def test_long_runs_stay_readable_and_small() -> None:
    document = a_document(1)
    one = document["rounds"][0] | {"refused": []}
    document["rounds"] = [one | {"round": r, "loss": 5 + math.sin(r), "slice": r // 150} for r in range(3000)]
    drawn = {plot.name: plot.svg for plot in plots.draw_all(document)}
    assert sum(len(svg) for svg in drawn.values()) < 1_500_000
    assert "slice 7" not in drawn["loss"]  # twenty boundaries are too many to name


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    heavy = "sorted({'matplotlib', 'jinja2', 'torch', 'rich'} & set(sys.modules))"
    code = f"import sys, fedrec.evaluation.report; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_drawing_leaves_pyplot_alone() -> None:
    code = "import sys, fedrec.evaluation.plots as p; p.draw_all({}); print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_release_says_who_taught_it_its_student_and_drift() -> None:
    document = a_document(1)
    document["releases"][-1] |= {
        "lesson": {"step": 100, "teachers": {"statistic": {"weight": 3.0}, "fitted": {"weight": 1.0}}, "epsilon": 0.0},
        "student": {"n_params": 1234, "share_of_params": 0.0961, "bytes": 4936},
        "drift": {"alarm": True, "speed": 2.0},
    }
    page = report.render_html(document)
    assert "100 steps on synthetic histories, by: statistic (weight 3), fitted (weight 1). Added epsilon: 0." in page
    assert "1,234 parameters (9.6% of the release" in page
    assert "the next slice learns 2 times as fast" in page
    assert "synthetic histories" not in report.render_html(a_document(1))
