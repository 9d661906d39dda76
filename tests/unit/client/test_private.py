"""Gradients of windows, their clip, noise and account: DP-SGD against a slow loop over the same windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant

from fedrec.client import private
from fedrec.client.private import fit_windows, gradients, window_event, windows_of
from fedrec.data.batches import Cohort, draw
from fedrec.errors import PrivacyError
from fedrec.models.build import build
from fedrec.models.configs import AnyModelConfig, FactorisationConfig, FullSoftmax, SampledSoftmax, TransformerConfig
from fedrec.models.recommender import Recommender, to_torch
from fedrec.params import Array, norm
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.noise import SecureNoise, SeededNoise
from fedrec.privacy.settings import WindowUnit
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key
from tests.support import dataset_of, small_rows

DATASET = dataset_of(small_rows())
N_ITEMS = len(DATASET.catalog)
KEY = Key.from_seed(5)
SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "expand": 1, "length": 8, "dropout": 0.3}
MODELS: dict[str, AnyModelConfig] = {
    "transformer": TransformerConfig(**SMALL, softmax=SampledSoftmax(negatives=6)),
    "full softmax": TransformerConfig(**SMALL, softmax=FullSoftmax()),
    "factorisation": FactorisationConfig(dim=4, length=8, targets=5, negatives=6),
}


class Silence:
    """No noise at all: to see what lies below it."""

    label = "none"

    def normal(self, shape: Any) -> Any:
        return np.zeros(tuple(shape))

    def discrete_gaussian(self, sigma: float, shape: Any) -> Any:
        return np.zeros(tuple(shape), np.int64)


def person(user: int = 3, low: int = 2, high: int | None = None) -> Cohort:
    n = int(np.diff(DATASET.log.offsets)[user])
    one = np.array([user], np.int64)
    return Cohort(DATASET.log, one, one, np.array([low]), np.array([n if high is None else high]))


def model_of(name: str) -> Recommender:
    model = build(MODELS[name], N_ITEMS, KEY.child("model"))
    with torch.no_grad():  # away from the start, where many gradients are near zero
        for place, value in enumerate(model.parameters()):
            value += 0.3 * torch.from_numpy(KEY.child("shift", place).numpy().standard_normal(value.shape)).float()
    return model


def loop(model: Recommender, windows: Cohort, key: Key) -> list[dict[str, torch.Tensor]]:
    """Each window's gradient by autograd on the whole table, one window after the other."""
    found = []
    for place in range(len(windows)):
        batch = to_torch(draw(windows.take(slice(place, place + 1)), model.spec, model.n_items, key.child("step", 0)))
        own = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
        loss = torch.func.functional_call(model, own, (batch, model.local_start(batch))).sum()
        parts = torch.autograd.grad(loss, list(own.values()), materialize_grads=True)
        found.append(dict(zip(own, parts, strict=True)))
    return found


def paid(unit: WindowUnit, noise: float, steps: int, budget: float | None = None) -> Charge:
    ledger = PrivacyLedger(None, epsilon=budget, delta=1e-5)
    return ledger.charge("round", window_event(unit, noise, steps), clip_norm=unit.clip_norm)


def test_windows_cut_a_history_into_pieces_that_know_nothing_of_each_other() -> None:
    whole = person(high=25)
    windows = windows_of(whole, 10)
    first = DATASET.log.offsets[3] + 2
    assert np.array_equal(windows.log.item, DATASET.log.item[first : first + 23])
    assert (windows.high - windows.low).tolist() == [10, 10, 3]
    model = model_of("transformer")
    batch = draw(windows, model.spec, N_ITEMS, KEY)
    touched = [set(batch.inputs[i]) | set(batch.targets[i][batch.target_mask[i]]) for i in range(3)]
    for place, items in enumerate(touched):
        own = set(windows.log.item[windows.log.offsets[place] : windows.log.offsets[place + 1]].tolist())
        assert items - {-1, 0} <= own


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_interaction_changes_the_gradient_of_its_window_alone(name: str) -> None:
    model, windows = model_of(name), windows_of(person(high=26), 8)
    before = gradients(model, windows, KEY)
    windows.log.item[9] = (windows.log.item[9] + 1) % N_ITEMS  # in the second window
    after = gradients(model, windows, KEY)
    changed = [any(not torch.equal(before[n][place], after[n][place]) for n in before) for place in range(3)]
    assert changed == [False, True, False]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_windows_equal_a_loop(name: str) -> None:
    model, windows = model_of(name), windows_of(person(high=30), 8)
    found, slow = gradients(model, windows, KEY), loop(model, windows, KEY)
    for place, expected in enumerate(slow):
        assert found.keys() == expected.keys()
        for part, value in expected.items():
            torch.testing.assert_close(found[part][place], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["transformer", "factorisation"])
def test_rows_that_a_window_does_not_name_have_no_gradient_padding_among_them(name: str) -> None:
    model, windows = model_of(name), windows_of(person(high=23), 10)  # the last is short, so padded
    batch = draw(windows, model.spec, N_ITEMS, KEY.child("step", 0))
    found = gradients(model, windows, KEY)["item"]
    seen_zero = False
    for place in range(len(windows)):
        own = windows.log.item[windows.log.offsets[place] : windows.log.offsets[place + 1]]
        named = set(own.tolist()) | set(batch.negatives[place].tolist())
        touched = set(torch.nonzero(found[place].abs().sum(1)).flatten().tolist())
        assert touched <= named
        seen_zero |= 0 not in named
    assert seen_zero, "item 0, which padding is written as, is in every window: the test shows nothing"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_a_step_without_noise_is_the_sum_of_clipped_gradients(
    name: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "GRADIENT_BYTES", 1)  # one window at a time, so Opacus has to add up
    model, whole = model_of(name), person(high=40)
    unit, local = WindowUnit(length=6, clip_norm=clip, sampling=0.6), LocalTraining(learning_rate=0.7)
    secret = Key.from_seed(8)
    update = fit_windows(model, whole, local, unit, 1.0, paid(unit, 1.0, 1), Silence(), secret)
    windows, key = windows_of(whole, 6), secret.child("step", 0)
    drawn = np.flatnonzero(key.child("windows").uniforms(windows.ids, 1)[:, 0] < 0.6)
    assert 1 < len(drawn) < len(windows)
    total = {part: np.zeros(value.shape) for part, value in update.items()}
    for own in loop(model, windows.take(drawn), key):
        length = norm({part: value.numpy() for part, value in own.items()})
        for part, value in own.items():
            total[part] -= 0.7 * min(1.0, clip / length) * value.numpy()
    for part, value in update.items():
        np.testing.assert_allclose(value, total[part], rtol=1e-3, atol=2e-5)
    if clip == 0.05:
        assert norm(update) <= 0.7 * clip * len(drawn) * (1 + 1e-5)


@pytest.mark.parametrize("source", [SeededNoise(KEY.child("noise")), SecureNoise()])
def test_the_noise_of_steps_has_the_size_that_was_paid_for(source: Any) -> None:
    model = model_of("transformer")
    unit, local = WindowUnit(clip_norm=0.5, sampling=1e-9), LocalTraining(steps=3, learning_rate=2.0)
    found: list[Array] = []
    for _ in range(20):  # nobody is drawn, so what is left is noise
        update = fit_windows(model, person(), local, unit, 4.0, paid(unit, 4.0, 3), source, KEY)
        found.append(np.concatenate([value.ravel() for value in update.values()]))
    errors = np.concatenate(found).astype(np.float64)
    sigma = 2.0 * 4.0 * 0.5 * np.sqrt(3)
    assert errors.std() == pytest.approx(sigma, rel=6 / np.sqrt(2 * len(errors)))
    assert abs(errors.mean()) < 6 * sigma / np.sqrt(len(errors))
    assert (errors**4).mean() / errors.var() ** 2 == pytest.approx(3.0, abs=6 * np.sqrt(24 / len(errors)))
    assert abs(np.corrcoef(found[0], found[1])[0, 1]) < 6 / np.sqrt(len(found[0]))


def test_a_window_without_a_finite_gradient_is_left_out() -> None:
    model, windows = model_of("transformer"), windows_of(person(high=26), 8)
    own = windows.log.item[:8].tolist()
    others = set(windows.log.item[8:].tolist())
    lone = next(item for item in own if item not in others)
    for attempt in range(50):  # a key under which the others do not draw the broken item as a negative
        key = KEY.child("attempt", attempt)
        if lone not in draw(windows, model.spec, N_ITEMS, key.child("step", 0)).negatives[1:]:
            break
    whole = gradients(model, windows, key)
    with torch.no_grad():
        dict(model.named_parameters())["item"][lone] = float("nan")
    found = gradients(model, windows, key)
    assert all(bool((part[0] == 0).all()) for part in found.values())
    for name, part in found.items():
        torch.testing.assert_close(part[1:], whole[name][1:])


def test_a_receipt_is_good_for_exactly_its_steps() -> None:
    model, unit = model_of("factorisation"), WindowUnit(sampling=0.5)
    charge = paid(unit, 2.0, 2)
    for local, noise, spent in ((LocalTraining(steps=3), 2.0, unit), (LocalTraining(steps=2), 1.0, unit),
                                (LocalTraining(steps=2), 2.0, WindowUnit(sampling=0.9))):  # fmt: skip
        with pytest.raises(PrivacyError, match="another event"):
            fit_windows(model, person(), local, spent, noise, charge, Silence(), KEY)
    other = WindowUnit(sampling=0.5, clip_norm=9.0)
    with pytest.raises(PrivacyError, match="clip norm"):
        fit_windows(model, person(), LocalTraining(steps=2), other, 2.0, charge, Silence(), KEY)
    fit_windows(model, person(), LocalTraining(steps=2), unit, 2.0, charge, Silence(), KEY)
    with pytest.raises(PrivacyError, match="released already"):
        fit_windows(model, person(), LocalTraining(steps=2), unit, 2.0, charge, Silence(), KEY)


@pytest.mark.parametrize(("noise", "sampling", "steps"), [(1.0, 0.5, 40), (2.0, 0.2, 100), (1.5, 1.0, 5)])
def test_the_ledger_agrees_with_the_accountant_of_opacus(noise: float, sampling: float, steps: int) -> None:
    event = window_event(WindowUnit(sampling=sampling), noise, steps)
    accountant = RDPAccountant()
    accountant.history = [(noise, sampling, steps)]
    theirs = accountant.get_epsilon(1e-5, alphas=[1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
    assert epsilon([event], 1e-5, "rdp") == pytest.approx(theirs, rel=0.01)
    assert epsilon([event], 1e-5) <= theirs
