"""The documents say what the code does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_pages_written_from_code_and_results_are_current() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8") == reference.page()
    assert "|  |" not in reference.page(), "a key has no docstring"
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == reference.results_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


def test_every_fedrec_command_in_the_documents_exists() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    quoted = "\n".join(re.findall(r"`[^`\n]+`", text))
    commands = set(re.findall(r"fedrec ((?:releases |data |server )?[a-z]+)", quoted))
    known = {"simulate", "recommend", "releases", "data", "server", "node", "doctor"}
    verbs = {command for command in commands if command.split()[0] in known}
    assert len(verbs) >= 5
    for verb in sorted(verbs - {"data", "releases", "server"}):
        done = subprocess.run(
            [sys.executable, "-c", "from fedrec.cli import main; main()", *verb.split(), "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (verb, done.stderr)


def test_the_python_example_learns_what_follows_what(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "simulations" / "own_data.py")],
        cwd=tmp_path,
        env={**os.environ, "FEDREC_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = re.search(r"comes (\S+); truly (\S+)", done.stdout)
    assert said is not None
    assert said[1] == said[2]
