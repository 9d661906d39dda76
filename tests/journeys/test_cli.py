"""What a person types, and what they see: the installed `fedrec`, in processes of its own."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import FEDREC, environment, fedrec, small_project, small_rows, write_csv

SMALL: dict[str, Any] = {"training__base__rounds": 4, "training__later__rounds": 2, "split__later": 1}
BRACKETS = "[draft] a [/b] title"
"""A title that means something to whoever prints with markup."""


def refused(result: subprocess.CompletedProcess[str], *told: str) -> str:
    """Check that a mistake gave one sentence on stderr, nothing on stdout and exit code 1; return the sentence."""
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert result.stdout == ""
    [sentence] = [line for line in result.stderr.splitlines() if line.startswith("fedrec: ")]
    assert "Traceback" not in result.stderr
    assert sentence.endswith((".", "?")), sentence
    for words in told:
        assert words in sentence, sentence
    return sentence


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import data with titles, simulate once with ``--json``, and return the folder."""
    root = tmp_path_factory.mktemp("project")
    toml = small_project(root, **SMALL)
    items = root / "items.csv"
    ids = sorted({item for _, item, _ in small_rows()}, key=lambda item: int(item[1:]))
    titles = [f"{item},{BRACKETS if item == 'i2' else f'Title of {item}'},drama|war" for item in ids]
    items.write_text("\n".join(["id,title,attributes", *titles]) + "\n", encoding="utf-8")
    columns = ("--user", "user", "--item", "item", "--time", "time", "--items", items)
    assert fedrec("data", "import", root / "rows.csv", *columns, "--out", root / "data", root=root).returncode == 0
    result = fedrec("simulate", toml, "--json", root=root)
    assert result.returncode == 0, result.stderr
    (root / "stdout.json").write_text(result.stdout, encoding="utf-8")
    return root


def test_simulate_with_json_prints_one_document_with_everything(project: Path) -> None:
    document = json.loads((project / "stdout.json").read_text(encoding="utf-8"))
    assert [(one["version"], one["slice"]) for one in document["releases"]] == [(1, 0), (2, 1)]
    for one in document["releases"]:
        assert one["seconds"] > 0
        assert min(one["bytes_down"], one["bytes_up"], one["client_bytes"]) > 0
        assert one["epsilon"] is None
        rows = {"release", "popularity", "local_only"} | ({"previous"} if one["version"] > 1 else set())
        assert set(one["rows"]) == rows
        for row in one["rows"].values():
            for name in ("ndcg@10", "hr@5", "recall@10"):
                estimate = row["all"]["metrics"][name]
                assert estimate.keys() == {"value", "low", "high"}
                assert all(math.isfinite(number) for number in estimate.values())
    assert document["command"].startswith("fedrec simulate ")
    on_disk = json.loads((project / "runs" / "small" / "001" / "report.json").read_text(encoding="utf-8"))
    assert on_disk == document
    assert "<html" in (project / "runs" / "small" / "001" / "report.html").read_text(encoding="utf-8")


def test_simulate_shows_progress_on_stderr_and_a_table_on_stdout(tmp_path: Path) -> None:
    toml = small_project(tmp_path, **SMALL)
    result = fedrec("simulate", toml, "--out", "my runs", "--registry", "my registry", "--seed", "8", root=tmp_path)
    assert result.returncode == 0, result.stderr
    for bar in ("slices", "rounds", "clients"):
        assert bar in result.stderr
        assert bar + " " not in result.stdout.replace("6 rounds, ", "")
    assert "2/2" in result.stderr
    for words in ("NDCG@10", "popularity", "local only", "previous", "Not private", "6 rounds"):
        assert words in result.stdout
    assert f"Report:   {Path('my runs/small/001/report.html')}" in result.stdout
    report = json.loads((tmp_path / "my runs/small/001/report.json").read_text(encoding="utf-8"))
    assert report["experiment"]["seed"] == 8
    assert {path.name for path in tmp_path.iterdir()} >= {"my runs", "my registry"}
    assert not (tmp_path / "runs").exists()


def test_evaluate_shows_a_table_and_refuses_what_is_not_there(project: Path) -> None:
    back = fedrec("evaluate", "latest", "--slice", "0", root=project)
    assert back.returncode == 0, back.stderr
    for words in (
        "Release 2 on slice 0",
        "what is retained",
        "NDCG@10",
        "popularity",
        "returning people",
        "Not private",
    ):
        assert words in back.stdout
    refused(fedrec("evaluate", "--slice", "7", root=project), "no slice 7", "0 to 1")


def test_recommend_shows_titles(project: Path) -> None:
    result = fedrec("recommend", "--history", "i2, i4", "-k", "3", root=project)
    assert result.returncode == 0, result.stderr
    assert f"After {BRACKETS}; Title of i4" in result.stdout
    assert "Release 2 recommends" in result.stdout
    assert result.stdout.count("Title of ") == 4
    assert "drama, war" in result.stdout


def test_a_title_with_brackets_is_shown_as_it_is(project: Path) -> None:
    result = fedrec("recommend", "-k", "100", root=project)
    assert result.returncode == 0, result.stderr
    assert BRACKETS in result.stdout


def test_recommend_with_json(project: Path) -> None:
    result = fedrec("recommend", "--history", "i2,i4", "-k", "3", "--release", "1", "--json", root=project)
    document = json.loads(result.stdout)
    assert document["release"] == 1
    assert document["history"] == [{"id": "i2", "title": BRACKETS}, {"id": "i4", "title": "Title of i4"}]
    assert [item["rank"] for item in document["items"]] == [1, 2, 3]
    assert not {"i2", "i4"} & {item["id"] for item in document["items"]}
    assert all(item["title"] in (BRACKETS, f"Title of {item['id']}") for item in document["items"])
    scores = [item["score"] for item in document["items"]]
    assert scores == sorted(scores, reverse=True)


def test_recommend_to_somebody_without_a_history(project: Path) -> None:
    result = fedrec("recommend", "--json", root=project)
    document = json.loads(result.stdout)
    assert (document["history"], document["release"], len(document["items"])) == ([], 2, 10)
    assert "After nothing yet" in fedrec("recommend", root=project).stdout


def test_recommend_refuses_what_is_not_there(project: Path) -> None:
    refused(fedrec("recommend", "--history", "i2,zzz", root=project), "Unknown item id 'zzz'")
    refused(fedrec("recommend", "--release", "7", root=project), "No release '7' in 'runs/registry': there is 1 to 2")
    refused(fedrec("recommend", "--release", "²", root=project), "No release '²'")
    refused(fedrec("recommend", "--registry", "nowhere", root=project), "No registry at 'nowhere'")
    assert not (project / "nowhere").exists()


def test_one_flipped_byte_is_noticed(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "runs" / "registry", tmp_path / "registry")
    path = tmp_path / "registry" / "releases" / "0002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    told = ("Release 2 is damaged", "does not match its SHA-256")
    refused(fedrec("recommend", "--registry", "registry", root=tmp_path), *told)
    assert fedrec("recommend", "--registry", "registry", "--release", "1", root=tmp_path).returncode == 0
    verified = fedrec("releases", "verify", "--registry", "registry", root=tmp_path)
    assert verified.returncode == 1
    assert all(words in verified.stdout for words in told)


def test_releases_are_listed_promoted_and_rolled_back(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "runs" / "registry", tmp_path / "registry")

    def releases(*arguments: str) -> Any:
        result = fedrec("releases", *arguments, "--registry", "registry", "--json", root=tmp_path)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def served() -> int:
        found = json.loads(fedrec("recommend", "--registry", "registry", "--json", root=tmp_path).stdout)
        return int(found["release"])

    listed = releases("list")
    assert [(one["version"], one["slice"], one["parent"]) for one in listed["releases"]] == [(1, 0, None), (2, 1, 1)]
    assert listed["current"] == 2
    assert releases("promote", "1") == {"current": 1}
    assert served() == 1
    assert releases("rollback") == {"current": 2}
    shown = fedrec("releases", "list", "--registry", "registry", root=tmp_path)
    assert "small/001" in shown.stdout
    refused(fedrec("releases", "promote", "9", "--registry", "registry", root=tmp_path), "No release '9'")


def test_a_wrong_experiment_is_refused_in_one_sentence_and_nothing_is_written(project: Path, tmp_path: Path) -> None:
    text = (project / "small.toml").read_text(encoding="utf-8")
    cases = {
        "none.toml": (None, "No experiment 'none.toml'"),
        "key.toml": (text.replace("dropout", "dropuot"), "Unknown key 'model.dropuot' in 'key.toml'"),
        "value.toml": (text.replace("seed = 3", 'seed = "x"'), "'seed' in"),
        "syntax.toml": (text.replace("[split]", "[split"), "is not valid TOML"),
        "data.toml": (text.replace(str(project / "data"), "nowhere"), "Unknown data set 'nowhere'"),
        "empty.toml": ("", "'model' is missing in"),
        "heads.toml": (text.replace("heads = 2", "heads = 3"), "heads"),
    }
    for name, (content, told) in cases.items():
        if content is not None:
            (tmp_path / name).write_text(content, encoding="utf-8")
        refused(fedrec("simulate", name, root=tmp_path), told.replace("in 'key.toml'", "in key.toml"))
    (tmp_path / "folder.toml").mkdir()
    refused(fedrec("simulate", "folder.toml", root=tmp_path), "Is a directory")
    assert not (tmp_path / "runs").exists()


def test_resume_says_why_it_cannot(project: Path, tmp_path: Path) -> None:
    toml = project / "small.toml"
    refused(fedrec("simulate", toml, "--resume", root=tmp_path), "Nothing to resume: no run in 'runs/small'")
    assert not (tmp_path / "runs").exists()
    before = tree(project / "runs")
    refused(fedrec("simulate", toml, "--resume", root=project), "Nothing to resume: run 'runs/small/001' is complete")
    assert tree(project / "runs") == before


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 96 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(project: Path, tiny_disk: Path) -> None:
    where = ("--out", tiny_disk / "runs", "--registry", tiny_disk / "registry")
    refused(fedrec("simulate", project / "small.toml", *where, root=project), "The disk is full: cannot write")
    left = [path for path in tiny_disk.rglob("*") if path.name.endswith("fedrec-tmp")]
    assert left == []
    subprocess.run(["mount", "-o", "remount,size=8m", tiny_disk], check=True)
    result = fedrec("simulate", project / "small.toml", *where, "--resume", root=project)
    assert result.returncode in (0, 1)
    if result.returncode:  # it was full before the run had a folder
        refused(result, "Nothing to resume")
        assert fedrec("simulate", project / "small.toml", *where, root=project).returncode == 0
    assert fedrec("releases", "verify", "--registry", tiny_disk / "registry", root=project).returncode == 0


def test_a_read_only_place_is_one_sentence_before_any_work(project: Path, tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    for where in (("--out", tiny_disk / "runs"), ("--registry", tiny_disk / "registry")):
        elsewhere = ("--registry", project / "other") if where[0] == "--out" else ("--out", project / "other runs")
        result = fedrec("simulate", project / "small.toml", *where, *elsewhere, root=project)
        refused(result, "No permission to write", "Read-only file system")
        assert "loss" not in result.stderr
    assert list(tiny_disk.iterdir()) == []
    assert not (project / "other runs").exists()


def test_an_interrupt_leaves_something_to_resume_and_says_so(tmp_path: Path) -> None:
    toml = small_project(tmp_path, training__base__rounds=100_000, split__later=0)
    # Whoever starts the tests in the background of a shell has them ignore interrupts, and their children with them.
    heeding = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", heeding, str(FEDREC), "simulate", str(toml)],
        cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    checkpoint = tmp_path / "runs" / "small" / "001" / "state.fedrec"
    end = time.monotonic() + 60
    try:
        while not checkpoint.exists() and time.monotonic() < end:
            time.sleep(0.05)
        first = checkpoint.read_bytes()
        while checkpoint.read_bytes() == first and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert stdout == ""
    assert "can be resumed with --resume" in stderr
    assert "Traceback" not in stderr


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import fedrec; fedrec.__version__", ("numpy", "torch", "flwr", "pydantic", "typer")),
        ("import fedrec.cli", ("numpy", "torch", "flwr", "pydantic")),
    ],
)
def test_importing_loads_nothing_heavy(code: str, heavy: tuple[str, ...]) -> None:
    assert python(f"import sys; {code}; print([m for m in {heavy!r} if m in sys.modules])") == "[]\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["simulate", "--help"], ["releases", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["fedrec", *{arguments!r}]
from fedrec.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print([m for m in ("numpy", "torch", "flwr", "pydantic") if m in sys.modules])
"""
    assert python(code).endswith("[]\n")


def test_help_names_every_verb_and_a_wrong_verb_is_refused(tmp_path: Path) -> None:
    shown = fedrec("--help", root=tmp_path)
    assert shown.returncode == 0
    for verb in ("simulate", "recommend", "releases", "data"):
        assert verb in shown.stdout
    wrong = fedrec("simulat", root=tmp_path)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_data_that_is_not_there_or_makes_no_sense_is_refused(tmp_path: Path) -> None:
    columns = ("--user", "user", "--item", "item", "--time", "time", "--out", "data")
    refused(fedrec("data", "import", "none.csv", *columns, root=tmp_path), "none.csv")
    table = write_csv(tmp_path / "rows.csv", small_rows(n=40))
    columns = ("--user", "person", "--item", "item", "--time", "time", "--out", "data")
    refused(fedrec("data", "import", table, *columns, root=tmp_path), "person")
    assert not (tmp_path / "data").exists()
