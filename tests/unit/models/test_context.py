"""The moment of a request: what is read from data, and that a model learns from it what the history cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedrec.cli import app
from fedrec.client.trainer import train_each
from fedrec.client.vectorised import train_batched
from fedrec.config import Experiment
from fedrec.data.batches import Cohort, draw, histories_of, moments_at
from fedrec.data.cleaning import Dataset
from fedrec.data.context import ContextConfig, split
from fedrec.data.log import InteractionLog
from fedrec.errors import ConfigError, FedrecError
from fedrec.grid.simulate import simulate
from fedrec.models import portable
from fedrec.models.build import build
from fedrec.models.configs import BlendConfig, TransformerConfig, moment_of
from fedrec.models.recommender import get_params, score_all
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key
from fedrec.server.recommend import recommend
from fedrec.server.registry import Registry
from tests.support import START, dataset_of, merged, small_document

DAY = 86_400
MIDNIGHT = START - START % DAY
CONTEXT: dict[str, Any] = {"hours": 2, "weekdays": True, "device": ["tv", "phone"], "place": ["home"]}
MODEL: dict[str, Any] = {
    "kind": "transformer", "dim": 8, "length": 8, "horizon": 1, "context": CONTEXT,
    "softmax": {"kind": "sampled", "negatives": 16},
}  # fmt: skip


def log_of(kinds: tuple[str, ...], events: list[int], times: list[int]) -> InteractionLog:
    n = len(events)
    return InteractionLog(
        np.array([0, n]), np.arange(n, dtype=np.int32), np.array(times), np.array(events, np.int8),
        np.full(n, np.nan, np.float32), ("u",), kinds,
    )  # fmt: skip


def test_moments_are_read_from_time_and_from_the_name_of_the_event() -> None:
    context = ContextConfig(**CONTEXT)
    monday_noon = 1_700_481_600  # 2023-11-20 12:00 UTC
    log = log_of(("play", "play@tv:home", "like@:home"), [0, 1, 2], [5, monday_noon, monday_noon - DAY // 2 - 1])
    everyone = np.zeros(1, np.int64)
    cohort = Cohort(log, everyone, everyone, everyone, everyone + 3)
    found = moments_at(cohort, np.array([[0, 1, 2]]), context)[0]
    names = ["am", "pm", *("mo", "tu", "we", "th", "fr", "sa", "su"), "tv", "phone", "home"]
    told = [{name for name, one in zip(names, row, strict=True) if one} for row in found]
    assert told == [set(), {"pm", "mo", "tv", "home"}, {"pm", "su", "home"}]  # 5 is an order, no time
    asked = context.moment({"time": monday_noon, "device": "tv", "place": "home"})
    assert np.array_equal(asked, found[1])
    assert np.array_equal(context.moment({"hour": 3}), np.eye(12, dtype=np.float32)[0])
    assert split("play@tv") == ("play", "tv", None)


def test_what_is_no_moment_is_refused() -> None:
    context = ContextConfig(**CONTEXT)
    for what, words in (
        ({"devise": "tv"}, "did you mean 'device'"),
        ({"device": "car"}, "knows no device 'car'"),
        ({"hour": 24}, "0 to 23"),
    ):
        with pytest.raises(ConfigError, match=words):
            context.moment(what)
    with pytest.raises(ConfigError, match="does not look"):
        moment_of(TransformerConfig(), {"hour": 3})
    with pytest.raises(ValueError, match="told apart"):
        ContextConfig()
    with pytest.raises(ValueError, match="does not know the moment"):
        BlendConfig(fitted=TransformerConfig(**MODEL))


def mornings_and_evenings() -> Dataset:
    """Everybody takes an even item in the morning and an odd one in the evening; the order of the two is drawn."""
    random, rows = Key.from_seed(0).child("moments").numpy(), []
    for user in range(60):
        for day in range(12):
            for half in np.flatnonzero(random.random(2) < 0.7):
                item = 2 * int(random.integers(8)) + int(half)
                rows.append((f"u{user}", f"i{item}", MIDNIGHT + day * DAY + int(half) * DAY // 2 + user))
    return dataset_of(rows)


def test_a_federated_run_learns_what_only_the_moment_tells(tmp_path: Path) -> None:
    dataset = mornings_and_evenings()
    training = {"base": {"rounds": 60}, "server": {"kind": "adam", "learning_rate": 3e-2}, "average": 0.0}
    ndcg = {}
    for name, changes in (("with", {"hours": 2}), ("without", None)):
        wanted = Experiment.parse(
            merged(
                {**small_document(), "model": {**MODEL, "context": changes}},
                {"training": training, "split": {"kind": "leave_one_out"}, "evaluation": {"local_only": {"people": 0}}},
            )
        )
        document, _ = simulate(wanted, runs=tmp_path / name, registry=tmp_path / name / "r", dataset=dataset)
        ndcg[name] = document["releases"][0]["rows"]["release"]["all"]["metrics"]["ndcg@10"]["value"]
    assert ndcg["with"] > ndcg["without"] + 0.05
    release = Registry(tmp_path / "with" / "r").load()
    for hour in (6, 18):
        items = recommend(release, ["i0"], 5, moment={"hour": hour}).items
        assert {int(item.id[1:]) % 2 for item in items} == {hour // 12}
    plain = [item.score for item in recommend(release, ["i0"], 5).items]
    assert plain == [item.score for item in recommend(release, ["i0"], 5, moment={}).items]
    call = ["recommend", "--registry", str(tmp_path / "with" / "r"), "--history", "i0", "--json"]
    assert CliRunner().invoke(app, [*call, "--moment", "hour=6"]).exit_code == 0
    with pytest.raises(FedrecError, match="hour=21"):
        CliRunner().invoke(app, [*call, "--moment", "late"], catch_exceptions=False)


def test_data_without_times_of_day_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    rows = [(f"u{i % 5}", f"i{i % 7}", i) for i in range(40)]
    wanted = Experiment.parse(
        merged({**small_document(), "model": MODEL}, {"split": {"kind": "leave_one_out"}, "runtime": {"nodes": 1}})
    )
    with pytest.raises(ConfigError, match="no times of day"):
        simulate(wanted, runs=tmp_path / "x", registry=tmp_path / "r", dataset=dataset_of(rows, "order"))
    assert not (tmp_path / "x").exists()


def test_one_client_a_batch_and_a_device_agree() -> None:
    kinds = ("play@tv:home", "play@phone")
    random = Key.from_seed(1).child("x").numpy()
    n = 40
    log = InteractionLog(
        np.arange(0, n + 1, 10), random.integers(0, 15, n).astype(np.int32), MIDNIGHT + np.arange(n) * 7000,
        random.integers(0, 2, n).astype(np.int8), np.full(n, np.nan, np.float32), tuple("abcd"), kinds,
    )  # fmt: skip
    users = np.arange(4, dtype=np.int64)
    cohort = Cohort(log, users, users, np.zeros_like(users), np.full_like(users, 9))
    model = build(TransformerConfig(**MODEL), 15, Key.from_seed(0))
    local, key = LocalTraining(steps=2, learning_rate=0.3), Key.from_seed(5)
    one, other = train_each(model, cohort, local, key), train_batched(model, cohort, local, key)
    shared = dict(model.named_parameters())
    for name, value in one.whole(shared).items():
        np.testing.assert_allclose(value.numpy(), other.whole(shared)[name].numpy(), atol=1e-5, err_msg=name)
    assert one.whole(shared)["moment"].abs().max() > 0
    params = get_params(model)
    params["moment"] = random.normal(size=params["moment"].shape).astype(np.float32)
    for name, value in model.named_parameters():
        value.data = torch.from_numpy(params[name])
    at = moment_of(model.config, {"device": "tv", "hour": 20})
    assert at is not None
    asked = draw(cohort, model.spec, 15, key)
    assert asked.moments.shape == (4, asked.targets.shape[1], 12)
    torch_scores = score_all(model, histories_of([[1, 2, 3]], model.spec), moments=at[None])[0]
    np.testing.assert_allclose(portable.score(model.config, params, [1, 2, 3], at), torch_scores, atol=1e-5)
