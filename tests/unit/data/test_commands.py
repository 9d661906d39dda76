"""`fedrec data`: each verb for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedrec.data.commands import app
from fedrec.data.sources import SOURCES, load_dataset, prepared_folder
from fedrec.data.synthetic import checkerboard, sequential
from fedrec.errors import DataError
from fedrec.random import Key

RUNNER = CliRunner()
CSV = "who,what,when,stars\nann,1,100,5\nann,2,200,4\nbob,2,300,3\nbob,2,300,3\nbob,,400,1\ncy,1,500,\n"
ITEMS = "id,title,attributes\n1,One,a|b\n2,Two,\n3,Three,c\n"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDREC_DATA", raising=False)
    monkeypatch.setenv("FEDREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")


def call(*words: str | Path) -> str:
    result = RUNNER.invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*words: str | Path) -> str:
    """Return the message of the DataError that a command ends with, having printed nothing to stdout."""
    result = RUNNER.invoke(app, [str(word) for word in words])
    assert result.exit_code == 1
    assert isinstance(result.exception, DataError), result.exception
    assert result.stdout == ""
    return str(result.exception)


def import_words(tmp_path: Path, *more: str | Path) -> list[str | Path]:
    (tmp_path / "rows.csv").write_text(CSV)
    (tmp_path / "items.csv").write_text(ITEMS)
    words = ["import", tmp_path / "rows.csv", "--user", "who", "--item", "what", "--time", "when"]
    return [*words, "--out", tmp_path / "made", *more]


def test_list_knows_every_source_and_whether_it_is_here(tmp_path, shared_data) -> None:
    checkerboard(6, 8, 2, 2, Key.from_seed(1)).save(prepared_folder("ml-1m"))
    listed = {one["name"]: one for one in json.loads(call("list", "--json"))["sources"]}
    assert set(listed) == set(SOURCES)
    assert [name for name, one in listed.items() if one["prepared"]] == ["ml-1m"]
    assert listed["ml-1m"]["folder"] == str(tmp_path / "cache" / "ml-1m-v1")
    assert [name for name, one in listed.items() if one["can_be_fetched"]] == ["ml-100k"]
    assert "Harper & Konstan" in listed["ml-100k"]["terms"]
    rooted = json.loads(call("list", "--json", "--data-root", shared_data))["sources"]
    assert all(one["local_files"] == str(shared_data / one["name"]) for one in rooted)


def test_list_shows_people_where_and_under_which_terms() -> None:
    checkerboard(6, 8, 2, 2, Key.from_seed(1)).save(prepared_folder("ml-1m"))
    text = call("list")
    assert all(name in text for name in SOURCES)
    assert "prepared in" in text
    assert "`fedrec data fetch` gets it" in text
    assert "Terms of ml-100k, ml-1m: GroupLens research licence" in text


def test_fetch_prepares_once_and_prints_the_terms_once(tmp_path, shared_data) -> None:
    words = ["fetch", "amazon-video", "--json", "--data-root", str(shared_data), "--cache", str(tmp_path / "elsewhere")]
    first, second = (RUNNER.invoke(app, words, catch_exceptions=False) for _ in range(2))
    made = json.loads(first.stdout)
    assert made == json.loads(second.stdout)
    assert (made["users"], made["items"], made["interactions"]) == (8_072, 11_830, 63_836)
    assert made["folder"] == str(tmp_path / "elsewhere" / "amazon-video-v1")
    assert made["digests"]["log"] == load_dataset(made["folder"]).log.digest()
    assert first.stderr.count("Terms: ") == 1
    assert second.stderr == ""


def test_fetch_refuses_unknown_names_even_of_folders(tmp_path) -> None:
    (tmp_path / "ml-1mm").mkdir()
    assert "did you mean 'ml-1m'?" in refusal("fetch", "ml-1mm", "--json")


def test_fetch_fails_if_the_cache_cannot_be_written(tmp_path, shared_data) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refusal("fetch", "amazon-video", "--data-root", shared_data, "--cache", tmp_path / "file")
    assert "could not be kept" in message
    assert "--cache" in message


def test_describe_does_not_fetch() -> None:
    message = refusal("describe", "ml-100k", "--json")
    assert "run `fedrec data fetch ml-100k`" in message
    assert "grouplens.org" not in message


def test_import_writes_a_data_set_that_describe_reads(tmp_path) -> None:
    words = import_words(tmp_path, "--value", "stars", "--items", tmp_path / "items.csv", "--name", "mine", "--json")
    made = json.loads(call(*words))
    assert made["cleaning"]["dropped"]["duplicate"] == made["cleaning"]["dropped"]["missing"] == 1
    facts = json.loads(call("describe", tmp_path / "made", "--json"))
    assert (facts["name"], facts["users"], facts["items"], facts["items_touched"]) == ("mine", 3, 3, 2)
    assert facts["interactions"] == 4
    assert facts["density"] == pytest.approx(4 / 9)
    assert facts["time"] == {
        "unit": "seconds",
        "first": "1970-01-01T00:01:40+00:00",
        "last": "1970-01-01T00:08:20+00:00",
        "days": 0.0,
    }
    assert facts["interactions_per_user"] == {"min": 1, "q1": 1, "median": 1, "q3": 1.5, "max": 2}
    # Items were touched 2, 2 and 0 times: mean absolute difference 8/9, half of it over the mean 4/3 is 1/3.
    assert facts["gini_of_items"] == pytest.approx(1 / 3)
    assert facts["cleaning"]["summary"].startswith("Kept 4 of 6 rows; dropped 1 with a missing")
    assert facts["digests"] == made["digests"]
    assert facts["provenance"]["source"] == "rows.csv"
    dataset = load_dataset(str(tmp_path / "made"))
    assert dataset.catalog.titles == ("One", "Two", "Three")
    assert dataset.catalog.attributes == (("a", "b"), (), ("c",))
    assert dataset.log.value[0] == 5


def test_import_applies_limits_formats_and_the_default_name(tmp_path) -> None:
    (tmp_path / "small.data.csv").write_text(
        "u,i,t,e\n1,a,2024-05-01,x\n1,b,2024-05-02,y\n2,a,2024-05-03,x\n9,c,2024-05-03,x\n"
    )
    words = ["import", tmp_path / "small.data.csv", "--user", "u", "--item", "i", "--time", "t", "--event", "e"]
    made = call(*words, "--time-format", "iso8601", "--min-item", "2", "--out", tmp_path / "out", "--json")
    assert json.loads(made)["cleaning"]["dropped"]["below_k_core"] == 2
    dataset = load_dataset(str(tmp_path / "out"))
    assert dataset.name == "small"
    assert dataset.log.user_ids == ("1", "2")
    assert dataset.log.time.tolist() == [1_714_521_600, 1_714_694_400]


def test_import_drops_what_lies_in_the_future(tmp_path) -> None:
    (tmp_path / "f.csv").write_text("u,i,t\n1,a,5\n1,b,2050-01-01\n".replace("2050-01-01", "99999999999"))
    words = ["import", tmp_path / "f.csv", "--user", "u", "--item", "i", "--time", "t", "--out", tmp_path / "out"]
    assert json.loads(call(*words, "--json"))["cleaning"]["dropped"]["impossible_time"] == 1


def test_a_refused_import_leaves_nothing(tmp_path) -> None:
    words = import_words(tmp_path)
    words[words.index("who")] = "whom"
    assert "has no column 'whom', only 'who', 'what', 'when', 'stars'; did you mean 'who'?" in refusal(*words)
    assert "No interaction is left" in refusal(*import_words(tmp_path, "--min-user", "50"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.csv", "rows.csv"]


def test_an_unknown_time_format_is_a_usage_error(tmp_path) -> None:
    result = RUNNER.invoke(app, [str(word) for word in import_words(tmp_path, "--time-format", "weeks")])
    assert result.exit_code == 2


def test_people_read_tables(tmp_path) -> None:
    text = call(*import_words(tmp_path, "--name", "[bold]mine"))
    assert "[bold]mine" in text
    text = call("describe", tmp_path / "made")
    assert "Kept 4 of 6 rows" in text
    assert "gini of items" in text


def test_order_only_data_shows_no_dates(tmp_path) -> None:
    made = sequential(4, 5, 3, Key.from_seed(1))
    made.provenance["time_unit"] = "order"
    made.save(tmp_path / "set")
    span = json.loads(call("describe", tmp_path / "set", "--json"))["time"]
    assert span["unit"] == "order"
    assert "first" not in span


def test_importing_the_commands_loads_nothing_heavy() -> None:
    code = (
        "import sys, fedrec.data.commands as c; print([m for m in ('numpy', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_blocks_writes_a_data_set_that_a_run_in_blocks_takes(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fedrec.data.blocks import block_slices
    from fedrec.data.cleaning import Dataset
    from fedrec.data.commands import app
    from tests.support import dataset_of, small_rows

    dataset_of(small_rows()).save(tmp_path / "whole")
    out = tmp_path / "cut"
    done = CliRunner().invoke(app, ["blocks", str(tmp_path / "whole"), "--out", str(out), "--later", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert len(block_slices(Dataset.load(out), 3)) == 3
