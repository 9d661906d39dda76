"""The house rules about who may import whom, and what a device without torch and flwr can load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fedrec"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A package outside fedrec -> the only places that may import it.
HOMES = {
    "flwr": {"client/app.py", "server/app.py", "protocol/flower.py", "grid/in_process.py", "grid/simulate.py"},
    "ray": set(),
    "grpc": {"client/gateway_client.py", "client/gateway/service.py", "client/gateway/control.py"},
    "peft": {"models/language.py"},
    "opacus": {"client/private.py"},
    "onnx": {"serving/export.py"},
    "onnxruntime": {"serving/export.py"},
    "fastapi": {"serving/http.py"},
    "uvicorn": {"serving/http.py"},
    "matplotlib": {"evaluation/plots.py", "evaluation/audit_page.py"},
    "jinja2": {"evaluation/report.py", "evaluation/audit_page.py"},
    "pyarrow": {"data/tabular.py"},
    "pickle": set(),
}

# What runs on a device that can hold neither torch nor flwr.
DEVICE_CORE = [
    "fedrec",
    "fedrec.errors",
    "fedrec.random",
    "fedrec.params",
    "fedrec.config",
    "fedrec.cli",
    "fedrec.data.batches",
    "fedrec.data.catalog",
    "fedrec.data.cleaning",
    "fedrec.data.log",
    "fedrec.data.slices",
    "fedrec.data.sources",
    "fedrec.data.synthetic",
    "fedrec.data.tabular",
    "fedrec.models.configs",
    "fedrec.privacy.clip",
    "fedrec.models.portable",
    "fedrec.client.shelf",
    "fedrec.protocol.link",
    "fedrec.protocol.parcels",
    "fedrec.protocol.signing",
    "fedrec.protocol.plan",
    "fedrec.protocol.tally",
    "fedrec.protocol.task",
    "fedrec.protocol.wire",
    "fedrec.client.answering",
    "fedrec.client.conditions",
    "fedrec.client.device_pool",
    "fedrec.client.enrolment",
    "fedrec.client.gateway_client",
    "fedrec.client.keeping",
    "fedrec.client.limits",
    "fedrec.client.participation",
    "fedrec.client.sdk",
    "fedrec.client.keys",
    "fedrec.client.pool",
    "fedrec.client.store",
    "fedrec.evaluation.intervals",
    "fedrec.evaluation.metrics",
    "fedrec.evaluation.ranking",
    "fedrec.server.registry",
]

WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'flwr', 'opacus', 'jaxtyping', 'matplotlib', 'pyarrow', 'ray'}:
            raise ModuleNotFoundError(f'{name} is not on this device', name=name)
sys.meta_path.insert(0, Absent())
"""

COUNT_ON_A_DEVICE = """
import numpy as np
from fedrec.client.pool import LogPool
from fedrec.data.slices import LastWindow
from fedrec.data.synthetic import checkerboard
from fedrec.models.configs import PopularityConfig
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CountTask
from fedrec.random import Key
key = Key.from_seed(1)
data = checkerboard(10, 20, 2, 5, key)
task = CountTask(window=LastWindow(skip=0))
plan = RoundPlan(0, 0, task, PopularityConfig(), 20, {}, key, data.catalog.digest(), np.arange(10))
tally = LogPool(data.log, data.catalog).run(RoundPlan.from_bytes(plan.to_bytes()))
print(tally.n_clients, int(tally.sums['counts'].sum()) == len(data.log))
"""


def imported(source: Path) -> set[str]:
    """Return the top-level packages that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(HOMES))
def test_outside_packages_are_imported_only_at_home(package: str) -> None:
    users = {str(source.relative_to(PACKAGE)) for source in SOURCES if package in imported(source)}
    assert users <= HOMES[package]


def test_the_rooms_import_downwards_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_device_core_loads_without_torch_and_flwr() -> None:
    code = WITHOUT + "import importlib\n" + "".join(f"importlib.import_module({m!r})\n" for m in DEVICE_CORE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_device_without_torch_takes_part_in_counting() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + COUNT_ON_A_DEVICE], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "10 True", done.stderr


def test_importing_fedrec_loads_nothing_heavy() -> None:
    code = "import sys, fedrec; print(sorted({'numpy', 'torch', 'flwr', 'pydantic', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_says_what_it_is_for() -> None:
    silent = [str(source) for source in SOURCES if not ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))]
    assert silent == []
