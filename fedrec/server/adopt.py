"""Whether, and how far, a fitted model is added to the spectral prior: validation decides and pays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedrec.evaluation.metrics import private_norm
from fedrec.models.blend import blended, mixed
from fedrec.models.configs import AnyModelConfig, BlendConfig
from fedrec.params import Params
from fedrec.server.judge import Contender, judge, judge_privately
from fedrec.server.state import ServerState
from fedrec.server.work import Work

EVEN = (1.0, 1.0, 1.0)
"""The prior's weights as its settings say."""
SURE = 3.0
"""A gain counts if it is more than so many standard errors of the noise on it: the best of three weights that do not
help passes with a probability of 0.4 % at most."""


def release_of(state: ServerState, model: AnyModelConfig) -> Params:
    """Return what a release of this state holds: the trained parameters, or those of a blend with its prior."""
    if not isinstance(model, BlendConfig):
        return state.released
    prior = mixed(state.prior, state.adoption.get("mix", EVEN))
    return blended(prior, state.released, float(state.adoption.get("weight", 0.0)))


def adopt(work: Work) -> Work:
    """Try the weights of a blend's fitted model on the slice's validation window, and keep the best that surely helps.

    With that one, the mixes of the prior's own parts are tried in the same way.

    In a slice in which nobody did anything the weight of the slice before stays.

    In a private run every weight that is tried costs one noised release of metrics, whatever `privacy.metrics` says:
    the choice shows in the release.
    """
    state, recipe = work.state, work.recipe
    model = recipe.experiment.model
    if not isinstance(model, BlendConfig) or "weight" in state.adoption:
        return work
    contenders = {
        f"weight {weight:g}": Contender(model, blended(state.prior, state.released, weight))
        for weight in (0.0, *model.weights)
    }
    tried, margin, overhead = asked(work, contenders)
    weight = best((0.0, *model.weights), tried, margin)
    metric = f"ndcg@{recipe.experiment.evaluation.ks[0]}"
    adoption = {"weight": weight, "metric": metric, "tried": tried, "margin": margin}
    work = work.advanced(adoption=adoption, overhead=overhead)
    if not model.mixes:
        return work
    names = {f"mix {' '.join(f'{factor:g}' for factor in mix)}": mix for mix in model.mixes}
    contenders = {
        name: Contender(model, blended(mixed(state.prior, mix), state.released, weight)) for name, mix in names.items()
    }
    more, margin, overhead = asked(work, contenders)
    top = max(more, key=more.__getitem__, default="")
    surely = top in more and more[top] - tried.get(f"weight {weight:g}", math.inf) > margin
    adoption |= {"mix": list(names[top] if surely else EVEN), "tried": tried | more}
    return work.advanced(adoption=adoption, overhead=overhead)


def asked(work: Work, contenders: Mapping[str, Contender]) -> tuple[dict[str, float], float, dict[str, Any]]:
    """Ask the slice's validation window about contenders.

    Returns:
        the NDCG of each at the first cut-off; what noise alone may put between two of them; the slice's overhead then.

    Raises:
        BudgetExhausted: a private run cannot pay for it; nothing was sent.
    """
    state, recipe, window = work.state, work.recipe, work.time_slice.validation
    if window is None:
        raise ValueError("choices need slices that keep a window for validation")
    n_items = work.time_slice.n_items
    question = replace(work.time_slice, test=window, n_items_test=n_items, known=None, life=(), masked=None)
    popularity, ks = {"counts": state.counts["counts"]}, recipe.experiment.evaluation.ks
    if recipe.guard is None:
        verdict = judge(contenders, question, work.trusted, recipe, popularity)
    else:
        verdict = judge_privately(recipe.guard, contenders, question, work.trusted, recipe, popularity)
    tried = {name: row["all"]["metrics"][f"ndcg@{ks[0]}"]["value"] for name, row in verdict["rows"].items()}
    people = min((row["all"]["n"] for row in verdict["rows"].values()), default=0)
    margin = 0.0
    if recipe.guard is not None:
        noise = recipe.guard.mechanism(recipe.guard.settings.metrics_noise, private_norm(ks))
        margin = sure_gain(noise.clip_norm * noise.noise_multiplier, people, max(tried.values(), default=0.0))
    return tried, margin, {part: state.overhead[part] + verdict.get(part, 0) for part in state.overhead}


def best(weights: tuple[float, ...], tried: Mapping[str, float], margin: float) -> float:
    """Return the weight with the best metric, or 0 where none is better than 0 by more than `margin`.

    >>> best((0.0, 0.1, 0.3), {"weight 0": 0.10, "weight 0.1": 0.12, "weight 0.3": 0.11}, 0.01)
    0.1
    >>> best((0.0, 0.1, 0.3), {"weight 0": 0.10, "weight 0.1": 0.12, "weight 0.3": 0.11}, 0.03)
    0.0
    """
    alone = tried.get("weight 0", 0.0)
    gains: dict[float, Any] = {
        weight: tried.get(f"weight {weight:g}", -math.inf) - alone for weight in weights if weight
    }
    top = max(gains, key=gains.__getitem__)
    return float(top) if gains[top] > margin else 0.0


def sure_gain(deviation: float, people: int, mean: float) -> float:
    r"""Return `SURE` standard errors of the difference of two means, sum and number of people noised on their own.

    .. math:: 3 \sqrt{2 (1 + m^2)} \; s / n

    Args:
        deviation: s, of the noise in a sum and in the number of people.
        people: n, the fewest that any of the noised numbers says.
        mean: m, the highest of the means.
    """
    return SURE * math.sqrt(2.0 * (1.0 + mean**2)) * deviation / max(1, people)
