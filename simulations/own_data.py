"""The Python API on data made here: build a data set, run a federation, recommend from its release.

Run it with: python simulations/own_data.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedrec import Experiment, Key, Registry
from fedrec.data.synthetic import sequential
from fedrec.grid.simulate import simulate
from fedrec.server.recommend import recommend

EXPERIMENT = {
    "name": "own-data",
    "split": {"kind": "leave_one_out"},
    "model": {"kind": "transformer", "dim": 32, "length": 20, "softmax": {"kind": "full"}},
    "training": {"base": {"rounds": 60}, "server": {"kind": "adam", "learning_rate": 1e-2}},
    "evaluation": {"local_only": {"people": 50}},
}


def main() -> None:
    """Learn which item follows which, and ask."""
    data = sequential(n_users=200, n_items=50, length=12, key=Key.from_seed(7))
    with tempfile.TemporaryDirectory() as folder:
        registry = Path(folder) / "registry"
        document, _ = simulate(Experiment.parse(EXPERIMENT), runs=Path(folder), registry=registry, dataset=data)
        for name, groups in document["releases"][0]["rows"].items():
            print(f"{name:<12} NDCG@10 {groups['all']['metrics']['ndcg@10']['value']:.3f}")
        history = [data.catalog.ids[i] for i in data.log.history(0)[:5]]
        found = recommend(Registry(registry).load(), history, k=1)
        print(f"after {', '.join(history)} comes {found.items[0].id}; truly {data.catalog.ids[data.log.history(0)[5]]}")


if __name__ == "__main__":
    main()
