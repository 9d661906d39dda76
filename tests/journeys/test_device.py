"""The example for app engineers does what its page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "device.md"


def test_the_example_of_the_page_prints_what_the_page_says(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    said = re.search(r"It prints `(.*?)`, `(.*?)` and `(.*?)`", text)
    assert example
    assert said
    done = subprocess.run([sys.executable, "-c", example[1]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == list(said.groups()), done.stderr
    assert list((tmp_path / "device").iterdir()) == []
