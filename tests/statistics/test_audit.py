"""An audit leaves a sound run alone, and refutes the claim of one whose mechanism is broken in the real pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedrec.audit.one_run import Recording, canary_bound, measured_epsilon, record, repeated_noise
from fedrec.config import Experiment
from fedrec.errors import RunError
from fedrec.evaluation.metrics import private_names
from fedrec.params import norm, scale
from fedrec.privacy import clip
from fedrec.privacy.adaptive import AdaptiveMechanism
from fedrec.privacy.discrete import ClientNoise
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.matrix import CorrelatedNoise
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.terms import Terms
from fedrec.protocol.tally import Expectation
from fedrec.protocol.task import Turn
from fedrec.random import Key
from fedrec.server.guard import Guard
from fedrec.server.run import cut
from tests.support import dataset_of, merged, small_document, small_rows

DATASET = dataset_of(small_rows())
DELTA, CANARIES, CONFIDENCE = 1e-5, 600, 0.99
PRIVACY: dict[str, Any] = {
    **{"mode": "central", "epsilon": 1.0, "delta": DELTA, "noise": "seed", "metrics": "research"},
    **{"fit": 1.0, "statistics": 1.0, "count": 10.0},
}
SPECTRAL: dict[str, Any] = {
    "model": {"kind": "spectral", "item_rank": 5, "feature_rank": 4, "length": 8},
    "training": {
        "statistics": {"features": {"rank": 4, "fourier": 0}},
        "base": {"rounds": 0},
        "later": {"rounds": 0},
    },
}


def statistics(**privacy: Any) -> Experiment:
    document = merged(small_document(), SPECTRAL)
    return Experiment.parse(merged(document, {"privacy": {**PRIVACY, **privacy}}))


def masked(**privacy: Any) -> Experiment:
    document = merged(small_document(split__later=0), SPECTRAL)
    sketch = {"training": {"statistics": {"sketch": "features", "item_share": 0.0, "features": {"rank": 30}}}}
    hidden = {"privacy": {**PRIVACY, "mode": "distributed", "secure_sum": {"minimum": 5}, **privacy}}
    return Experiment.parse(merged(merged(document, sketch), hidden))


def rounds(**privacy: Any) -> Experiment:
    document = small_document(split__later=0, training__base__rounds=8)
    return Experiment.parse(merged(document, {"privacy": {**PRIVACY, **privacy}}))


def turns(**privacy: Any) -> Experiment:
    document = small_document(split__later=0, training__base__rounds=9)
    document["training"]["cohort"] = {"kind": "turns", "groups": 3}
    banded = {**PRIVACY, "fit_noise": {"kind": "banded", "band": 3}}
    return Experiment.parse(merged(document, {"privacy": {**banded, **privacy}}))


def learnt(**privacy: Any) -> Experiment:
    return rounds(adaptive={}, **privacy)


def heard(experiment: Experiment, seed: int = 1) -> Recording:
    return record(experiment, DATASET, cut(experiment, DATASET), CANARIES, Key.from_seed(seed))


def bounds(found: Recording) -> tuple[float, float]:
    """Return the bound of the guesses and the one of the measured noise."""
    guessed = canary_bound(found.heard, found.included, DELTA, CONFIDENCE).epsilon
    measured = measured_epsilon(found.heard, found.included, DELTA, CONFIDENCE)
    assert measured is not None
    return guessed, measured


def claimed(found: Recording) -> float:
    assert found.life.ledger is not None
    return found.life.ledger.spent()


@pytest.mark.parametrize("make", [statistics, rounds, turns])
def test_a_sound_run_keeps_its_claim(make: Callable[[], Experiment]) -> None:
    found = heard(make())
    guessed, measured = bounds(found)
    assert 0.98 < claimed(found) <= 1.0
    assert guessed <= claimed(found)
    # The noise is measured at hundreds of spots, so the bound is near; it must not pass.
    assert 0.85 < measured <= claimed(found)
    assert repeated_noise(found.heard) is None


def test_a_run_that_learns_its_clip_norm_keeps_its_claim() -> None:
    found = heard(learnt())
    guessed, measured = bounds(found)
    assert len({one.clip_norm for one in found.heard if one.task == "fit"}) > 4
    assert guessed <= claimed(found)
    # Eight noised counts tell their noise only roughly.
    assert 0.5 < measured <= claimed(found)


def test_the_count_of_a_learnt_clip_norm_is_attacked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise on the count the sum still has some, and a round costs more than was charged."""
    sound = AdaptiveMechanism.noised

    def bare(self: AdaptiveMechanism, total: Any, within: float, n: int, cohort: float, *rest: Any) -> Any:
        mean, _ = sound(self, total, within, n, cohort, *rest)
        return mean, (within - n / 2) / cohort + 0.5

    monkeypatch.setattr(AdaptiveMechanism, "noised", bare)
    found = heard(learnt())
    assert bounds(found)[1] > claimed(found)


def scored(**privacy: Any) -> Experiment:
    return statistics(metrics="private", **privacy)


def test_metrics_are_attacked_too_and_keep_the_claim() -> None:
    found = heard(scored())
    metrics = [one for one in found.heard if one.task == "evaluate"]
    assert len(metrics) > 1
    assert not found.unheard
    for one in metrics:
        assert one.speaks.sum() == len(private_names(scored().evaluation.ks)) + 1
        assert np.allclose(one.influence, np.where(one.there & one.speaks, 1.0, 0.0), atol=1e-6)
    guessed, measured = bounds(found)
    assert guessed <= claimed(found)
    assert 0.5 < measured <= claimed(found)


def test_metrics_without_noise_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = GaussianMechanism.noised

    def noised(self: GaussianMechanism, total: Any, *rest: Any) -> Any:
        return dict(total) if "metrics" in total else sound(self, total, *rest)

    monkeypatch.setattr(GaussianMechanism, "noised", noised)
    assert bounds(heard(scored()))[1] == math.inf


def test_turns_are_taken_by_canaries_too() -> None:
    found = heard(turns())
    assert not found.unheard
    there = np.array([one.there for one in found.heard if one.task == "fit"])
    assert there.shape == (9, CANARIES)
    assert (there.sum(axis=0)[found.included] == 3).all()
    assert not (there[1:] & there[:-1]).any()
    assert not (there[2:] & there[:-2]).any()


def test_people_who_come_out_of_turn_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turn, "taken", lambda self, ids: np.ones(len(ids), np.bool_))
    found = heard(turns())
    assert bounds(found)[1] > claimed(found)


def test_correlated_noise_of_which_rows_are_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = CorrelatedNoise.row

    def row(self: CorrelatedNoise, t: int) -> Any:
        return {name: value * (t % 3 > 0) for name, value in sound(self, t).items()}

    monkeypatch.setattr(CorrelatedNoise, "row", row)
    found = heard(turns())
    assert bounds(found)[1] == math.inf


def test_a_masked_sum_keeps_its_claim_and_hides_nothing_from_the_audit() -> None:
    experiment = masked()
    found = record(experiment, DATASET, cut(experiment, DATASET), 120, Key.from_seed(1))
    assert [one.task for one in found.heard] == ["count", "cooccurrence"]
    for one in found.heard:
        assert np.allclose(one.influence, np.where(one.there & one.speaks, 1.0, 0.0), atol=1e-4)
    guessed, measured = bounds(found)
    assert guessed <= claimed(found)
    # Noise is sized for a third of the clients falling silent; what was not needed comes off.
    assert 0.7 < measured <= claimed(found)


def test_clients_that_add_too_little_noise_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Terms.client_noise

    def little(self: Terms, n_parties: int) -> ClientNoise:
        noise = sound(self, n_parties)
        return ClientNoise(noise.base / 3, noise.extra / 3)

    monkeypatch.setattr(Terms, "client_noise", little)
    experiment = masked()
    found = record(experiment, DATASET, cut(experiment, DATASET), 120, Key.from_seed(1))
    assert bounds(found)[1] > claimed(found)


def test_a_loose_budget_is_told_from_a_strict_one_by_guesses_alone() -> None:
    guessed = [bounds(heard(statistics(epsilon=e)))[0] for e in (0.5, 40.0)]
    assert guessed[0] < 0.4
    assert 1.5 < guessed[1] <= 40.0


def test_canaries_are_clipped_and_asked_as_often_as_charged() -> None:
    found = heard(rounds())
    fits = [one for one in found.heard if one.task == "fit"]
    assert len(fits) == 8
    for one in fits:
        assert one.event is not None
        assert np.allclose(one.influence, np.where(one.there & one.speaks, 1.0, 0.0), atol=1e-4)
        assert not one.there[~found.included].any()
    share = np.mean([one.there[found.included].mean() for one in fits])
    rate = next(iter({one.event.sampling for one in fits if one.event}))
    assert share == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / (8 * found.included.sum())))


def test_no_noise_is_refuted_by_guesses_and_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def noised(self: GaussianMechanism, total: Any, expected_cohort: float, charge: Any, noise: Any) -> Any:
        charge.use(self.noise_multiplier, self.clip_norm)
        return scale(total, 1.0 / expected_cohort)

    monkeypatch.setattr(GaussianMechanism, "noised", noised)
    found = heard(statistics())
    guessed, measured = bounds(found)
    assert guessed > 2 * claimed(found)
    assert measured == math.inf


SOUND = GaussianMechanism.noised


def weakened(factor: float) -> Any:
    def noised(self: GaussianMechanism, total: Any, expected_cohort: float, charge: Any, noise: Any) -> Any:
        right = SOUND(self, total, expected_cohort, charge, noise)
        bare = scale(total, 1.0 / expected_cohort)
        return {name: bare[name] + (right[name] - bare[name]) * factor for name in bare}

    return noised


def test_noise_over_the_root_of_the_cohort_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianMechanism, "noised", weakened(1 / math.sqrt(22)))  # 22 people are in the first slice
    found = heard(statistics())
    assert min(bounds(found)) > claimed(found)


def test_two_releases_for_one_charge_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mean of two releases, each with noise of its own, is a release with noise over the root of 2.
    monkeypatch.setattr(GaussianMechanism, "noised", weakened(math.sqrt(0.5)))
    found = heard(statistics())
    assert bounds(found)[1] > claimed(found)


def test_a_contribution_that_is_not_clipped_is_refused_by_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "clip_factors", lambda norms, bound: np.ones(len(norms), np.float32))
    with pytest.raises(RunError, match="above the bound"):
        heard(rounds())


def test_clipping_after_the_sum_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "clip_factors", lambda norms, bound: np.ones(len(norms), np.float32))
    monkeypatch.setattr(Expectation, "check", lambda self, tally: None)

    def noised(self: GaussianMechanism, total: Any, expected_cohort: float, charge: Any, noise: Any) -> Any:
        most = self.clip_norm * 300  # a bound of the sum, as if that were one of each person
        return SOUND(self, scale(total, min(1.0, most / norm(total))), expected_cohort, charge, noise)

    monkeypatch.setattr(GaussianMechanism, "noised", noised)
    found = heard(rounds())
    assert min(bounds(found)) > claimed(found)


def test_more_people_than_were_charged_for_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = GaussianMechanism.event

    def event(self: GaussianMechanism, sampling: float = 1.0) -> GaussianEvent:
        return sound(self, sampling / 4 if sampling < 1 else sampling)

    monkeypatch.setattr(GaussianMechanism, "event", event)
    found = heard(rounds())
    assert bounds(found)[1] > claimed(found)


def test_noise_that_is_used_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "secret", lambda self, charge: Key.from_seed(3))
    assert repeated_noise(heard(rounds()).heard) == ("slice 0: round 0", "slice 0: round 1")


def test_releases_that_nobody_paid_for_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = PrivacyLedger.charge

    def charge(self: PrivacyLedger, name: str, *rest: Any) -> Any:
        unpaid = "round" in name and not name.endswith("0")
        book = PrivacyLedger(None, epsilon=None, delta=DELTA) if unpaid else self
        return sound(book, name, *rest)

    monkeypatch.setattr(PrivacyLedger, "charge", charge)
    found = heard(rounds())
    assert bounds(found)[1] > claimed(found)


def test_exact_sums_give_everybody_away() -> None:
    experiment = Experiment.parse(merged(small_document(), SPECTRAL))
    found = heard(experiment)
    assert found.life.ledger is None
    bound = canary_bound(found.heard, found.included, DELTA, CONFIDENCE)
    assert bound.epsilon == bound.ceiling > 2.5
    assert measured_epsilon(found.heard, found.included, DELTA, CONFIDENCE) == math.inf


@pytest.mark.slow
def test_sound_runs_are_called_broken_no_oftener_than_the_confidence_says() -> None:
    passed = np.zeros(2, np.int64)
    for seed in range(200):
        found = heard(statistics().model_copy(update={"seed": seed}), seed)
        guessed = canary_bound(found.heard, found.included, DELTA, 0.95).epsilon
        measured = measured_epsilon(found.heard, found.included, DELTA, 0.95)
        assert measured is not None
        passed += np.array([guessed, measured]) > claimed(found)
    # 10 of 200 at most are expected; 20 is more than three deviations of a binomial above.
    assert passed.max() <= 20
