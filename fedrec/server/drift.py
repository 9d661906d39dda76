"""Did taste move? A test on metrics that are released anyway decides how fast the next slice is learnt.

A pure function of the records of a run, so a resumed run decides as an uninterrupted one did. (river's detectors keep
their state in objects that only pickle can store, which this house does not read.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedrec.config import Experiment
from fedrec.errors import PrivacyError
from fedrec.models.transfer import DriftConfig
from fedrec.privacy.settings import NoPrivacy

if TYPE_CHECKING:
    from fedrec.server.work import Work


def page_hinkley(values: Sequence[float], tolerance: float) -> list[float]:
    r"""Return the test's statistic after each value: how far they rose above their own mean.

    .. math:: m_t = \sum_{i \le t} (x_i - \bar x_i - \delta), \qquad PH_t = m_t - \min_{i \le t} m_i

    with the mean of the values so far. Large means that they rise.

    Args:
        values: x.
        tolerance: delta, the rise per value that does not count.

    >>> [round(v, 3) for v in page_hinkley([1.0, 1.0, 1.3, 1.6], 0.05)]
    [0.0, 0.0, 0.15, 0.475]

    Source: Page, Biometrika 1954; as in Gama et al., ACM Computing Surveys 2014, section 3.2.1.
    """
    found, total, low, mean = [], 0.0, float("inf"), 0.0
    for n, value in enumerate(values, start=1):
        mean += (value - mean) / n
        total += value - mean - tolerance
        low = min(low, total)
        found.append(total - low)
    return found


def watched(
    releases: Sequence[Mapping[str, Any]], rows: Mapping[str, Any], settings: DriftConfig, k: int
) -> dict[str, Any]:
    """Return what a release's record says of drift.

    The signal is popularity's NDCG over the release's, on the same test: a slice that is hard for everybody is no
    drift, one for which what was learnt has lost its worth is. After an alarm the test begins anew.

    Args:
        releases: records of the releases before, oldest first.
        rows: of this release's verdict.
        settings: when to sound.
        k: cut-off of the metric.

    Returns:
        "signal": this release's, None if it was not measured; "statistic"; "alarm"; "speed": factor on the server's
        learning rate in the next slice.
    """
    signal = _signal(rows, f"ndcg@{k}")
    since: list[float] = []
    for record in releases:
        before = record.get("drift") or {}
        since = [] if before.get("alarm") else [*since, *([before["signal"]] if before.get("signal") else [])]
    if signal is None:
        return {"signal": None, "statistic": 0.0, "alarm": False, "speed": 1.0}
    first = since[0] if since else signal
    statistic = page_hinkley([value / first for value in (*since, signal)], settings.tolerance)[-1]
    alarm = statistic > settings.threshold
    return {
        "signal": signal,
        "statistic": round(statistic, 6),
        "alarm": alarm,
        "speed": settings.speed if alarm else 1.0,
    }


def watch(work: Work) -> Work:
    """Note what the trial says of drift, in the release's record."""
    settings, k = work.recipe.experiment.training.drift, work.recipe.experiment.evaluation.ks[0]
    found = None if settings is None else watched(work.state.releases, work.verdict["rows"], settings, k)
    return work.noted(drift=found)


def _signal(rows: Mapping[str, Any], metric: str) -> float | None:
    found = [rows.get(row, {}).get("all", {}).get("metrics", {}).get(metric) for row in ("popularity", "release")]
    if None in found:
        return None
    popular, own = (float(one["value"]) for one in found)
    return popular / own if popular > 0 and own > 0 else None


def hurried(releases: Sequence[Mapping[str, Any]]) -> float:
    """Return the factor on the server's learning rate that the last release asks for."""
    return float((releases[-1].get("drift") or {}).get("speed", 1.0)) if releases else 1.0


def check_drift(experiment: Experiment) -> None:
    """Refuse a speed that exact metrics decide in a private run: it shows in every later release.

    Raises:
        PrivacyError: the metrics are exact.
    """
    settings = experiment.privacy
    if experiment.training.drift is None or isinstance(settings, NoPrivacy):
        return
    if settings.metrics == "research":
        raise PrivacyError(
            "A learning rate that exact metrics decide shows in later releases, and nobody pays for it; set "
            'privacy.metrics to "private" or leave out [training.drift].'
        )
