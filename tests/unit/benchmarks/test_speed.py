"""The contenders of the speed benchmark do the same work: their updates are those of fedrec's slow twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import speed
from benchmarks.peers import central, plain, processes
from benchmarks.peers.workloads import KEY, Workload, in_process, sequence, small
from fedrec.client.pool import LogPool
from fedrec.client.trainer import step_batches, train_each
from fedrec.models.configs import FactorisationConfig
from fedrec.models.factorisation import Factorisation
from fedrec.models.recommender import to_torch
from fedrec.protocol.task import LocalTraining


def tiny(steps: int) -> Workload:
    return sequence(6, 8, steps, n_items=60, dim=8, blocks=1, softmax={"kind": "sampled", "negatives": 12})


def parameters(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def test_a_plain_small_client_computes_the_update_of_fedrecs_factorisation() -> None:
    workload = small(3, 2)
    config = workload.experiment.model
    assert isinstance(config, FactorisationConfig)
    model = Factorisation(config, plain.N_ITEMS, KEY.child("model"))
    cohort, local = workload.cohort().take(slice(1, 2)), workload.task.local
    batches = [to_torch(batch) for batch in step_batches(cohort, model, local, KEY)]

    client = plain.SmallClient()
    with torch.no_grad():
        client.item.weight.copy_(model.item)
        client.user.copy_(model.local_start(batches[0])["user"][0])
    plain.train(client, iter([(batch.targets[0], batch.negatives[0]) for batch in batches]))

    expected = train_each(model, cohort, local, KEY).dense["item"][0]
    assert torch.linalg.vector_norm(expected) > 1e-3
    torch.testing.assert_close(client.item.weight.detach() - model.item.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_plain_round_takes_the_mean_over_clients_and_steps_of_32_out_of_160() -> None:
    history = torch.randperm(plain.N_ITEMS)[: plain.PER_USER]
    shared = torch.rand(plain.N_ITEMS, plain.DIM)
    drawn = list(plain.batches(history, torch.Generator().manual_seed(3)))
    assert [(len(t), len(n)) for t, n in drawn] == [(plain.BATCH, plain.NEGATIVES)] * plain.STEPS
    one = plain.round_of(history[None], shared, torch.Generator().manual_seed(3)) - shared
    touched = one.abs().sum(1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) == set(torch.cat([part for pair in drawn for part in pair]).tolist())


@pytest.mark.parametrize("steps", [1, 3])
def test_the_plain_loop_adds_up_the_same_clipped_updates_as_a_pool(steps: int) -> None:
    workload = tiny(steps)
    local = workload.task.local.model_copy(update={"clip_norm": 0.05})
    plan = replace(workload.plan(), task=workload.task.model_copy(update={"local": local}))
    tally = LogPool(workload.log, workload.catalog).run(plan)
    assert tally.stats["clipped"] > 0
    model = workload.model()
    before = parameters(model)
    totals = central.one_by_one(model, workload.cohort(), local, plan.key)
    assert totals.keys() == tally.sums.keys()
    for name, total in totals.items():
        np.testing.assert_allclose(total.numpy(), tally.sums[name], rtol=1e-3, atol=1e-6, err_msg=name)
    after = parameters(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_centralised_step_is_the_mean_of_the_clients_steps() -> None:
    workload = tiny(1)
    local = LocalTraining(steps=1, learning_rate=0.1, clip_norm=1e9)
    plan = replace(workload.plan(), task=workload.task.model_copy(update={"local": local}))
    sums = LogPool(workload.log, workload.catalog).run(plan).sums
    model = workload.model()
    before = parameters(model)
    central.together(model, workload.cohort(), local, plan.key, block=len(workload.cohort()))
    for name, value in parameters(model).items():
        np.testing.assert_allclose(value - before[name], sums[name] / 6, rtol=1e-3, atol=1e-6, err_msg=name)


def test_a_centralised_factorisation_moves_each_user_vector_by_its_own_loss() -> None:
    workload = small(3, 2)
    model, local = workload.model(), workload.task.local
    cohort = workload.cohort().take(slice(0, 1))
    expected = train_each(model, cohort, local, KEY).dense["item"][0].numpy()
    before = parameters(model)["item"]
    central.together(model, cohort, local, KEY, block=1)  # alone, so that the shared model is the client's own
    np.testing.assert_allclose(parameters(model)["item"] - before, expected, rtol=1e-4, atol=1e-6)


def test_whole_rounds_run_in_process_with_everybody_asked() -> None:
    go = in_process(tiny(1))
    go()
    go()


def test_contenders_take_turns_and_the_first_call_does_not_count() -> None:
    calls: list[str] = []
    seconds = speed.timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "test")
    assert calls == list("ababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_contender_that_fails_is_skipped_with_its_last_words() -> None:
    with pytest.raises(processes.Skipped, match=r"exit code 1: ModuleNotFoundError.*no_such_contender"):
        processes.measured("no_such_contender")
