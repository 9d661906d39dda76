"""The contract of every recommender, joined by one entry in `tests.contracts.recommender`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.func import functional_call, grad, vmap

from fedrec.client.pool import LogPool
from fedrec.data.batches import Batch, BatchSpec, histories, histories_of
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import LastWindow
from fedrec.data.synthetic import checkerboard, sequential
from fedrec.models.build import build, restore
from fedrec.models.configs import AnyModelConfig, NearestConfig, PopularityConfig, SpectralConfig
from fedrec.models.recommender import Recommender, get_params, learnt, score_all
from fedrec.params import digest, norm
from fedrec.protocol import wire
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CountTask
from fedrec.random import Key
from tests.contracts.recommender import (
    EVERYTHING,
    KEY,
    RECOMMENDERS,
    Entry,
    close,
    drawn,
    everybody,
    federate,
    lively,
    uneven_log,
)

N_ITEMS = 40
LENGTHS = (1, 2, 5, 9, 12)
PERSONAL = {name: entry for name, entry in RECOMMENDERS.items() if build(entry.config, 2, KEY).personal}
SEQUENTIAL = {name: entry for name, entry in RECOMMENDERS.items() if entry.sequential}


@pytest.fixture(params=RECOMMENDERS.values(), ids=RECOMMENDERS.keys())
def config(request: pytest.FixtureRequest) -> AnyModelConfig:
    found: AnyModelConfig = request.param.config
    return found


@pytest.fixture
def model(config: AnyModelConfig) -> Recommender:
    return lively(config, N_ITEMS)


@pytest.fixture
def batch(model: Recommender) -> Batch:
    return drawn(model, everybody(uneven_log(LENGTHS, N_ITEMS, KEY)))


def scores_of(model: Recommender, lists: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(score_all(model, histories_of(lists, model.spec)))


def users_of(model: Recommender) -> torch.Tensor:
    items, mask = histories_of([[3, 1, 4], [], [7] * 6], model.spec)
    return model.encode(torch.from_numpy(items), torch.from_numpy(mask)).detach()


def padded(batch: Batch, columns: int, garbage: int) -> Batch:
    """Return the batch with masked columns of any item added to inputs and targets."""

    def pad(part: torch.Tensor, value: int | bool) -> torch.Tensor:
        return torch.nn.functional.pad(part, (0, columns), value=value)

    return batch._replace(
        inputs=pad(batch.inputs, garbage),
        input_mask=pad(batch.input_mask, False),
        targets=pad(batch.targets, garbage),
        target_mask=pad(batch.target_mask, False),
        events=pad(batch.events, 0) if batch.events.shape[1] else batch.events,
        values=pad(batch.values, 1) if batch.values.shape[1] else batch.values,
    )


# Shapes


def test_users_scores_and_losses_have_the_shapes_and_dtypes_of_the_contract(model: Recommender, batch: Batch) -> None:
    users = users_of(model)
    assert users.ndim == 2
    assert len(users) == 3
    scores, some = model.score(users), model.score(users, torch.tensor([[1, 2], [3, 3], [0, 39]]))
    loss = model.loss(batch)
    assert (scores.shape, some.shape, loss.shape) == ((3, N_ITEMS), (3, 2), (len(LENGTHS),))
    assert {part.dtype for part in (users, scores, some, loss)} == {torch.float32}
    assert torch.equal(model(batch), loss)


def test_scores_of_some_items_are_those_columns_of_all_scores(model: Recommender) -> None:
    users = users_of(model)
    items = torch.tensor([[5, 5, 0], [39, 1, 2], [8, 20, 31]])
    close(model.score(users, items), model.score(users).gather(1, items), 1e-6)


def test_the_model_names_its_parameters_truly(model: Recommender, batch: Batch) -> None:
    params = dict(model.named_parameters())
    assert model.row_names & params.keys()
    assert all(len(params[name]) == N_ITEMS for name in model.row_names & params.keys())
    assert not model.local_names & params.keys()
    local = model.local_start(batch)
    assert local.keys() == model.local_names
    assert all(len(value) == len(LENGTHS) and not value.requires_grad for value in local.values())
    assert isinstance(model.spec, BatchSpec)


def test_a_personal_model_tells_two_histories_apart_and_another_does_not(model: Recommender) -> None:
    one, other = scores_of(model, [[1, 2, 3], [4, 5]])
    assert torch.equal(one, other) is not model.personal


# Histories and padding


def test_somebody_without_a_history_gets_finite_scores(model: Recommender) -> None:
    alone, among = scores_of(model, [[]]), scores_of(model, [[], [1, 2, 3, 4], [39]])
    assert torch.isfinite(alone).all()
    assert torch.isfinite(among).all()
    close(among[:1], alone)


def test_a_person_scores_the_same_alone_and_among_longer_histories(model: Recommender) -> None:
    lists = [[1], [2, 3, 4, 5, 6, 7, 8], [9, 9]]
    close(scores_of(model, lists), torch.cat([scores_of(model, [items]) for items in lists]))


def test_padding_does_not_change_scores(model: Recommender) -> None:
    items, mask = (torch.from_numpy(part) for part in histories_of([[1, 2, 3], [4]], model.spec))
    more = torch.nn.functional.pad(items, (0, 4), value=7)
    close(model.encode(more, torch.nn.functional.pad(mask, (0, 4))), model.encode(items, mask))


@pytest.mark.parametrize("garbage", [0, 7])
def test_padding_does_not_change_the_loss(model: Recommender, batch: Batch, garbage: int) -> None:
    close(model.loss(padded(batch, 3, garbage)), model.loss(batch))


def test_only_the_newest_interactions_count_in_a_long_history(model: Recommender) -> None:
    newest = [item % N_ITEMS for item in range(7, 7 + model.spec.length)]
    close(scores_of(model, [[11] * 5 + newest]), scores_of(model, [[12] * 3 + newest]))


# Loss and gradients


def test_the_loss_of_a_batch_is_the_losses_of_each_person_alone(model: Recommender) -> None:
    cohort = everybody(uneven_log(LENGTHS, N_ITEMS, KEY))
    alone = [model.loss(drawn(model, cohort.take([place]))) for place in range(len(cohort))]
    together = model.loss(drawn(model, cohort))
    close(together, torch.cat(alone))
    assert len(set(together.tolist())) == len(LENGTHS)


def test_a_person_without_targets_costs_nothing_beyond_what_does_not_depend_on_them(
    model: Recommender, batch: Batch
) -> None:
    none = batch._replace(target_mask=torch.zeros_like(batch.target_mask))
    other = none._replace(targets=(none.targets + 1) % N_ITEMS)
    assert torch.isfinite(model.loss(none)).all()
    if model.spec.kind == "pairs":
        close(model.loss(none), model.loss(other))
    else:
        assert model.loss(none).abs().max() == 0


def test_every_parameter_that_the_loss_uses_has_a_gradient(model: Recommender, batch: Batch) -> None:
    if not learnt(model):
        pytest.skip("nothing is trained")
    model.loss(batch).sum().backward()
    for name, value in learnt(model).items():
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name
        assert value.grad.abs().max() > 0, name


def test_a_gathering_model_leaves_the_rows_of_other_items_alone(model: Recommender, batch: Batch) -> None:
    if not model.gathers:
        pytest.skip("touches every row by design")
    some = Batch(*(part[:2] for part in batch))  # two people, so that much of the catalogue stays out
    some = some._replace(negatives=some.negatives[:, :5], negative_since=some.negative_since[:, :5])
    model.loss(some).sum().backward()
    touched = torch.zeros(N_ITEMS, dtype=torch.bool)
    for part in (some.inputs, some.targets, some.negatives):
        touched[part.clamp(min=0)] = True
    assert not touched.all()
    for name in model.row_names & learnt(model).keys():
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        assert gradient[~touched].abs().max() == 0
        assert gradient[some.targets[some.target_mask]].abs().max() > 0


def test_clients_under_vmap_are_clients_in_a_loop(model: Recommender, batch: Batch) -> None:
    params = {name: value.detach() for name, value in learnt(model).items()}
    local = model.local_start(batch)

    def one(own: dict[str, torch.Tensor], mine: dict[str, torch.Tensor], part: Batch) -> torch.Tensor:
        single = Batch(*(value[None] for value in part))
        loss: torch.Tensor = functional_call(model, own, (single, {n: v[None] for n, v in mine.items()}))
        return loss.sum()

    in_dims = (None, 0, 0)
    close(vmap(one, in_dims=in_dims)(params, local, batch), model.loss(batch))
    together = vmap(grad(one), in_dims=in_dims)(params, local, batch)
    for place in range(len(LENGTHS)):
        mine = {name: value[place] for name, value in local.items()}
        alone = grad(one)(params, mine, Batch(*(part[place] for part in batch)))
        for name, value in alone.items():
            close(together[name][place], value)


# Growth


def test_growth_keeps_old_scores_and_adds_items(model: Recommender) -> None:
    lists = [[1, 2, 3], [], [39, 0]]
    before = scores_of(model, lists)
    grown = model.grow(N_ITEMS + 7, KEY.child("grow"))
    after = scores_of(grown, lists)
    assert type(grown) is type(model)
    assert (grown.n_items, after.shape) == (N_ITEMS + 7, (3, N_ITEMS + 7))
    assert torch.isfinite(after).all()
    close(after[:, :N_ITEMS], before, 1e-6)
    old, new = get_params(model), get_params(grown)
    assert all(np.array_equal(new[n][:N_ITEMS] if n in model.row_names else new[n], old[n]) for n in old)
    assert scores_of(model, lists).equal(before)  # the old model stays as it was


def test_growing_in_two_steps_is_growing_once(model: Recommender) -> None:
    key = KEY.child("grow")
    once = model.grow(N_ITEMS + 9, key)
    twice = model.grow(N_ITEMS + 4, key).grow(N_ITEMS + 9, key)
    assert digest(get_params(once)) == digest(get_params(twice))


def test_new_rows_depend_on_the_key_alone_and_not_on_what_was_learnt(config: AnyModelConfig) -> None:
    key = KEY.child("grow")
    models = lively(config, N_ITEMS), lively(config, N_ITEMS, Key.from_seed(2))
    one, other = (get_params(model.grow(N_ITEMS + 5, key)) for model in models)
    assert all(np.array_equal(one[name][N_ITEMS:], other[name][N_ITEMS:]) for name in models[0].row_names & one.keys())


def test_a_grown_model_trains(model: Recommender) -> None:
    grown = model.grow(N_ITEMS + 6, KEY)
    batch = drawn(grown, everybody(uneven_log(LENGTHS, N_ITEMS + 6, KEY.child("later"))))
    loss = grown.loss(batch)
    if learnt(model):
        loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(bool(value.grad is not None and torch.isfinite(value.grad).all()) for value in learnt(grown).values())


# Bytes


def test_saved_and_loaded_it_scores_the_same(model: Recommender) -> None:
    document = wire.pack("model", {"config": model.config.model_dump(mode="json")}, get_params(model))
    header, params = wire.unpack("model", document)
    again = restore(type(model.config).model_validate(header["config"]), N_ITEMS, params)
    lists = [[1, 2, 3], [], [39, 0]]
    assert scores_of(again, lists).equal(scores_of(model, lists))


def test_the_same_key_gives_the_same_bytes_and_another_key_others(config: AnyModelConfig) -> None:
    one, same, other = (get_params(build(config, N_ITEMS, Key.from_seed(seed))) for seed in (1, 1, 2))
    assert digest(one) == digest(same)
    has_initial_values = norm(one) > 0
    assert (digest(one) != digest(other)) is has_initial_values
    by_counting = isinstance(config, PopularityConfig | SpectralConfig | NearestConfig)
    assert has_initial_values is not by_counting


def test_a_model_does_not_use_the_global_generator(config: AnyModelConfig, batch: Batch) -> None:
    before = torch.get_rng_state()
    model = build(config, N_ITEMS, KEY).train()
    first = model.loss(batch)
    torch.manual_seed(5)
    assert torch.equal(model.loss(batch), first)
    torch.set_rng_state(before)


# Known answers


def share_of_own_taste(model: Recommender, made: Dataset, n_groups: int) -> float:
    """Return to what share of people an unseen item of their own group is recommended first."""
    people = everybody(made.log)
    best = best_unseen(model, made, people.high)
    return float((best % n_groups == np.arange(made.log.n_users) % n_groups).mean())


def share_of_next(model: Recommender, made: Dataset) -> float:
    """Return to what share of people the last item of their history is recommended first, given those before."""
    best = best_unseen(model, made, everybody(made.log).high - 1)
    return float((best == made.log.item[made.log.offsets[1:] - 1]).mean())


def best_unseen(model: Recommender, made: Dataset, end: NDArray[np.int64]) -> NDArray[np.int64]:
    scores = score_all(model, histories(everybody(made.log), end, model.spec))
    for user, known in enumerate(end):
        scores[user, made.log.history(user)[:known]] = -np.inf
    return scores.argmax(1)


@pytest.mark.parametrize("entry", PERSONAL.values(), ids=PERSONAL.keys())
def test_trained_together_it_finds_the_items_of_each_persons_own_taste(entry: Entry) -> None:
    made = checkerboard(n_users=60, n_items=36, n_groups=3, per_user=8, key=KEY)
    assert share_of_own_taste(federate(replace(entry, rounds=0), made), made, n_groups=3) < 0.7
    assert share_of_own_taste(federate(entry, made), made, n_groups=3) >= 0.9


@pytest.mark.parametrize("entry", SEQUENTIAL.values(), ids=SEQUENTIAL.keys())
def test_trained_together_it_finds_what_comes_next(entry: Entry) -> None:
    made = sequential(n_users=60, n_items=24, length=12, key=KEY)
    window = LastWindow(skip=1)
    assert share_of_next(federate(replace(entry, rounds=0), made, window), made) < 0.5
    assert share_of_next(federate(entry, made, window), made) >= 0.9


def test_an_impersonal_model_puts_what_most_people_took_first() -> None:
    made = checkerboard(n_users=31, n_items=20, n_groups=2, per_user=6, key=KEY)
    pool, n_items = LogPool(made.log, made.catalog), len(made.catalog)
    plan = RoundPlan(
        0, 0, CountTask(window=EVERYTHING), PopularityConfig(), n_items, {}, KEY, made.catalog.digest(), np.arange(31)
    )
    model = restore(PopularityConfig(), n_items, pool.run(plan).sums)
    scores = score_all(model, histories_of([[], [1, 2]], model.spec))
    counts = np.bincount(made.log.item, minlength=n_items)
    assert len(set(counts.tolist())) > 3
    assert (np.diff(counts[np.argsort(-scores[0], kind="stable")]) <= 0).all()
    assert np.array_equal(scores[0], scores[1])


# Scoring into memory that is there already


@torch.no_grad()
def test_scores_written_into_memory_are_the_scores(model: Recommender, batch: Batch) -> None:
    users = model.encode(batch.inputs, batch.input_mask)
    out = torch.full((len(users), N_ITEMS), float("nan"))
    model.score_into(users, out)
    close(out, model.score(users))


def test_states_at_places_score_as_the_histories_up_to_them(model: Recommender) -> None:
    for length in (9, model.spec.length + 3):  # one that fits into the model, and one that does not
        items = (np.arange(2)[:, None] * 7 + np.arange(length) * 3) % N_ITEMS
        places = np.array([[0, 3, length], [length, 1, length - 1]])
        with torch.no_grad():
            found = model.score(model.states(torch.from_numpy(items), torch.from_numpy(places)).flatten(0, 1))
        lists = [row[:place].tolist() for row, own in zip(items, places, strict=True) for place in own]
        close(found, torch.from_numpy(score_all(model, histories_of(lists, model.spec))))
