from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from fedrec.client.answering import Answer, Answerer, able
from fedrec.client.conditions import Conditions
from fedrec.client.keeping import drop_unsent, kept_unsent
from fedrec.client.limits import spent
from fedrec.client.sdk import Device, Enrolment, Limits
from fedrec.data.catalog import ItemCatalog
from fedrec.data.slices import LastWindow
from fedrec.errors import ConfigError, PlanRefused, PrivacyError, UnknownItem
from fedrec.models.configs import FactorisationConfig, PopularityConfig
from fedrec.privacy.settings import LocalNoise, LocalPrivacy, UserUnit
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.signing import DeviceRelease, Terms, public_key, sign
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CountTask
from fedrec.random import Key
from tests.architecture import WITHOUT

SERVER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NOW = 1_700_000_000
N = 6
CATALOG = ItemCatalog(tuple("abcdef"), tuple("ABCDEF"), ((),) * N, np.zeros(N, np.int64))
COUNTS = np.array([5, 9, 7, 1, 2, 3], np.float32)
TASTES = np.array([[1, 0], [1, 0.1], [0.9, 0], [0, 1], [0.1, 1], [0, 0.9]], np.float32)

SEEDED = LocalNoise(noise_multiplier=1.0, noise="seed", unit=UserUnit())


def release(version: int = 1, key: Ed25519PrivateKey = SERVER) -> bytes:
    made = DeviceRelease(version, PopularityConfig(), {"counts": COUNTS}, CATALOG)
    return sign("release", made.to_bytes(), key)


def device(folder: Path, limits: Limits | None = None, envelope: bytes | None = None) -> Device:
    return Device(folder, release=envelope or release(), trusted=[public_key(SERVER)], limits=limits, now=lambda: NOW)


def plan_of(**changes: object) -> RoundPlan:
    task = CountTask(window=LastWindow(skip=0))
    asked = RoundPlan(0, 3, task, PopularityConfig(), N, {}, Key.from_seed(1), CATALOG.digest(), np.array([17]))
    return replace(asked, **changes)  # type: ignore[arg-type]


def terms_of(**changes: object) -> Terms:
    kept = {"ledger": "main", "cohort_minimum": 50, "epsilon": 1.0, "delta": 1e-6, "expires_at": NOW + 60,
            "nonce": "0" * 32}  # fmt: skip
    return Terms.model_validate(kept | changes)


def asked(one: Device, plan: RoundPlan, terms: Terms | None, key: Ed25519PrivateKey = SERVER) -> Answer:
    envelope = sign("plan", plan.to_bytes(), key, terms)
    return Answerer(one.store, one.pool, one.trusted, one.limits).answer("run", b"", envelope, NOW)


def test_it_recommends_what_the_person_does_not_have(tmp_path: Path) -> None:
    with device(tmp_path) as one:
        one.record("b", time=1)
        assert [found.item for found in one.recommend(2)] == ["c", "a"]
        assert [found.title for found in one.recommend(2, exclude=["c"])] == ["A", "F"]
        assert [found.item for found in one.recommend(1, context=["c"])] == ["a"]
        assert one.recommend(1, known=True)[0].item == "b"
        assert len(one.store.history()) == 1, "a context is not recorded"
        with pytest.raises(UnknownItem, match="Unknown item id 'odd'"):
            one.recommend(1, context=["odd"])


def test_reasons_add_up_to_the_score_where_a_model_is_a_sum(tmp_path: Path) -> None:
    config = FactorisationConfig(dim=2, length=10)
    made = DeviceRelease(1, config, {"item": TASTES}, CATALOG)
    with device(tmp_path, envelope=sign("release", made.to_bytes(), SERVER)) as one:
        for time, item in enumerate("bdbe"):
            one.record(item, time=time)
        reasons = one.explain("c")
        assert reasons[0].item == "b"
        assert reasons[0].contribution > 0 > reasons[-1].contribution
        from fedrec.models import portable

        whole = portable.score(config, {"item": TASTES}, [1, 3, 1, 4])[2]
        assert sum(reason.contribution for reason in reasons) == pytest.approx(float(whole), rel=1e-5)


def test_items_that_joined_after_the_release_are_kept_and_not_scored(tmp_path: Path) -> None:
    made = DeviceRelease(1, PopularityConfig(), {"counts": COUNTS[:4]}, CATALOG, n_items=4)
    with device(tmp_path, envelope=sign("release", made.to_bytes(), SERVER)) as one:
        one.record("f")
        assert [found.item for found in one.recommend(10)] == ["b", "c", "a", "d"]
        with pytest.raises(ConfigError, match="'e' joined after release 1"):
            one.explain("e")


def test_what_it_is_told_it_remembers(tmp_path: Path) -> None:
    enrolment = Enrolment(
        address="localhost:1", root_certificates="", token="t" * 43, trusted=(public_key(SERVER).hex(),)
    )
    limits = Limits(cohort_minimum=30)
    Device(tmp_path, enrolment=enrolment, release=None, limits=limits).close()
    with Device(tmp_path) as one:
        one.adopt(release())
        assert (one.enrolment, one.limits) == (enrolment, limits)
    with Device(tmp_path) as again:
        assert again.release.version == 1
        for path in tmp_path.iterdir():
            assert b"tttttt" not in path.read_bytes(), "the token lies sealed"


def test_a_strangers_or_an_older_release_is_refused(tmp_path: Path) -> None:
    with device(tmp_path, envelope=release(2)) as one:
        with pytest.raises(PlanRefused, match="whom this device does not trust"):
            one.adopt(release(3, Ed25519PrivateKey.generate()))
        with pytest.raises(PlanRefused, match="Release 1 is older than release 2"):
            one.adopt(release(1))
        assert one.adopt(release(1), older=True).version == 1


def test_a_device_without_a_release_or_an_enrolment_says_what_to_do(tmp_path: Path) -> None:
    with Device(tmp_path, senses=Conditions) as one:
        with pytest.raises(ConfigError, match="no release yet"):
            one.recommend()
        assert one.participate().why == "The device is not charging and not unmetered and not idle."
        with pytest.raises(ConfigError, match="is not enrolled"):
            one.participate(when=Conditions())


def test_an_answer_is_written_down_before_it_is_sent(tmp_path: Path) -> None:
    with device(tmp_path) as one:
        for item in "abb":
            one.record(item)
        found = asked(one, plan_of(), terms_of())
        tally = Tally.from_bytes(found.document)
        assert (tally.n_clients, tally.sums["counts"].tolist()) == (1, [1, 1, 0, 0, 0, 0])
        assert one.sent() == []
        found.keep(one.store, "task", "run")
        line = one.sent()[0]
        assert (line["what"], line["round"], line["ledger"], line["epsilon"]) == ("count", 3, "main", 1.0)
        assert (line["bytes"], line["masked"], line["tensors"]) == (len(found.document), False, {"counts": [N]})
        kept = kept_unsent(one.store)
        assert kept is not None
        assert (kept.document, kept.task) == (found.document, "task")
        assert one.privacy_spent().epsilon == 1.0
        one.forget(items="a")
        assert kept_unsent(one.store) is None, "what is forgotten is not sent later"


def test_somebody_without_anything_in_the_window_tells_nothing(tmp_path: Path) -> None:
    with device(tmp_path) as one:
        tally = Tally.from_bytes(asked(one, plan_of(), terms_of()).document)
        assert (tally.n_clients, dict(tally.sums)) == (0, {})


REFUSED = [
    ({"catalog_digest": "f" * 64}, {}, "by catalogue ffffffffffff, which this device does not know"),
    ({}, {"cohort_minimum": 19}, "opens sums of 19 people, this device hides among at least 20"),
    ({}, {"epsilon": 8.1}, "to epsilon 8.1 at delta 1e-06, above its own 8 at 0.0001"),
    ({}, {"delta": 1e-3}, "above its own 8"),
    ({}, {"epsilon": None}, "guarantees no privacy"),
    ({}, {"expires_at": NOW}, "The plan expired 0 s ago"),
    ({}, {"secure": "a" * 64}, "asks for a sum that is not masked"),
    (
        {"task": CountTask(window=LastWindow(skip=0), clip_norm=1.0, private=SEEDED)},
        {},
        "noise from a seed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "terms", "why"), REFUSED, ids=[why[:30] for _, _, why in REFUSED])
def test_a_plan_that_asks_for_too_much_is_refused(
    tmp_path: Path, plan: dict[str, object], terms: dict[str, object], why: str
) -> None:
    with device(tmp_path) as one:
        one.record("a")
        with pytest.raises(PlanRefused, match=why):
            asked(one, plan_of(**plan), terms_of(**terms))
        assert one.sent() == []
        assert one.privacy_spent().ledgers == ()


def test_unsigned_wrongly_signed_and_repeated_plans_are_refused(tmp_path: Path) -> None:
    with device(tmp_path) as one:
        with pytest.raises(PlanRefused, match="does not trust"):
            asked(one, plan_of(), terms_of(), Ed25519PrivateKey.generate())
        with pytest.raises(PlanRefused, match="without terms"):
            asked(one, plan_of(), None)
        plain = plan_of().to_bytes()
        with pytest.raises(PlanRefused, match="is not signed"):
            Answerer(one.store, one.pool, one.trusted, one.limits).answer("run", b"", plain, NOW)
        asked(one, plan_of(), terms_of()).keep(one.store, "task", "run")
        with pytest.raises(PlanRefused, match="answered before"):
            asked(one, plan_of(), terms_of())


def test_the_ledger_is_over_the_whole_life_and_over_all_servers(tmp_path: Path) -> None:
    with device(tmp_path) as one:
        for nonce, (ledger, epsilon) in enumerate([("main", 3.0), ("main", 5.0), ("other", 2.0)]):
            terms = terms_of(nonce=f"{nonce:032x}", ledger=ledger, epsilon=epsilon)
            asked(one, plan_of(), terms).keep(one.store, "task", "run")
        assert one.privacy_spent().epsilon == 7.0
        with pytest.raises(PlanRefused, match=r"to epsilon 8\.5"):
            asked(one, plan_of(), terms_of(nonce="f" * 32, ledger="third", epsilon=1.5))
        with pytest.raises(PlanRefused, match="had spent 5 before; what is spent never comes back"):
            asked(one, plan_of(), terms_of(nonce="f" * 32, epsilon=4.0))
        assert spent([]).epsilon == 0


def test_without_torch_it_counts_and_recommends(tmp_path: Path) -> None:
    code = (
        WITHOUT
        + f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[3])!r})
from pathlib import Path
from tests.unit.client import test_sdk as t
one = t.device(Path({str(tmp_path)!r}))
one.record("b")
print(one.recommend(1)[0].item, t.able(one.limits), len(t.asked(one, t.plan_of(), t.terms_of()).document) > 100)
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "c ['count', 'cooccurrence'] True", done.stderr
    assert set(able(Limits())) >= {"fit", "count"}


def test_importing_the_sdk_is_light() -> None:
    """How long it takes is measured by `benchmarks.gateway`; this is what makes it short."""
    code = """
import sys, fedrec.client.sdk
from pydantic import BaseModel
print([m for m in ("torch", "flwr", "grpc", "scipy", "asyncio", "typer", "rich", "pandas") if m in sys.modules])
kinds = [v for n, m in list(sys.modules.items()) if n.startswith("fedrec") for v in vars(m).values()]
ours = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel) and k.__module__.startswith("fedrec")]
print(len(ours) > 20, [k.__name__ for k in ours if k.model_config.get("use_attribute_docstrings")])
built = {k.__name__ for k in ours if k.__pydantic_complete__}  # those that serve as defaults
print(len(built) < len(ours) / 3, "Terms" in built, "DeviceRelease" in built)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True []", "True False False"], (
        "a schema is built where it is first needed"
    )


OWN = LocalPrivacy(epsilon=6.0, delta=1e-5, unit=UserUnit(), metrics="research")


def noised() -> RoundPlan:
    private = LocalNoise(noise_multiplier=2.0, unit=UserUnit())
    return plan_of(task=CountTask(window=LastWindow(skip=0), clip_norm=1.0, private=private))


def test_in_mode_local_a_device_pays_from_its_own_ledger_and_stops_when_it_is_spent(tmp_path: Path) -> None:
    with device(tmp_path, Limits(local=OWN)) as one:
        one.record("b", time=1)
        sums = []
        for number in range(20):
            terms = terms_of(epsilon=None, delta=0.0, nonce=f"{number:032x}")
            found = asked(one, noised(), terms)
            tally = Tally.from_bytes(found.document, noised().coding)
            if not tally.n_clients:
                break
            sums.append(tally.sums["counts"])
            found.keep(one.store, "task", "run")
            drop_unsent(one.store)
        assert 2 <= len(sums) < 20
        assert np.abs(sums[0] - sums[1]).max() > 0.5, "noise is drawn anew for each"
        spent = one.privacy_spent()
        assert 0 < (spent.epsilon or 0.0) <= OWN.epsilon
        assert [(each.ledger, each.rounds) for each in spent.ledgers] == [("this device's own ledger", len(sums))]
        assert (tmp_path / "ledgers").is_dir()
        one.forget_everything()
    assert not (tmp_path / "ledgers").exists()


def test_a_device_with_a_ledger_of_its_own_answers_nothing_less_private(tmp_path: Path) -> None:
    promised = terms_of(epsilon=None, delta=0.0)
    with device(tmp_path / "a", Limits(local=OWN)) as one:
        one.record("b", time=1)
        with pytest.raises(PrivacyError, match="without the noise that these clients insist on"):
            asked(one, plan_of(task=CountTask(window=LastWindow(skip=0), clip_norm=1.0)), terms_of(epsilon=0.5))
        with pytest.raises(PlanRefused, match="noise from a seed"):
            asked(one, seeded(), promised)
        with pytest.raises(PlanRefused, match="epsilon 9 at delta"):
            asked(one, plan_of(), terms_of(epsilon=3.0))
    with device(tmp_path / "b") as one, pytest.raises(PlanRefused, match="keeps no ledger to pay it from"):
        asked(one, noised(), promised)
    with pytest.raises(ValidationError, match="may spend more than the device does over its life"):
        Limits(epsilon=1.0, local=OWN)


def seeded() -> RoundPlan:
    return plan_of(task=CountTask(window=LastWindow(skip=0), clip_norm=1.0, private=SEEDED))
