"""Recommending from a release, for anybody who brings a history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from fedrec.data.batches import histories_of
from fedrec.errors import RegistryError
from fedrec.models.build import restore
from fedrec.models.configs import AnyModelConfig, ModelConfig, moment_of
from fedrec.models.explain import Explanation, explain
from fedrec.models.recommender import score_all
from fedrec.server.release import Release


@dataclass(frozen=True)
class Recommended:
    """One recommended item."""

    rank: int
    id: str
    title: str
    attributes: tuple[str, ...]
    score: float
    why: Explanation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON; "why" is there only if it was asked for."""
        document = asdict(self)
        return document if self.why else {name: value for name, value in document.items() if name != "why"}


@dataclass(frozen=True)
class Recommendations:
    """What is recommended, and the titles of the history that it comes from."""

    history_titles: tuple[str, ...]
    items: tuple[Recommended, ...]


class Recommending:
    """A release that is ready to answer: its model is restored once, however often it is asked; safe across threads."""

    def __init__(self, release: Release, student: bool = False) -> None:
        """Restore the model of a release, or its device student.

        Raises:
            RegistryError: a student is asked for, and there is none.
        """
        self.release, self.student = release, student
        document, params = release.manifest.model, release.params
        if student:
            if release.manifest.student is None or release.student is None:
                raise RegistryError(
                    f"Release {release.version} has no device student; train with a table [training.student], or leave "
                    "out --student."
                )
            document, params = release.manifest.student["model"], release.student
        self._config: AnyModelConfig = TypeAdapter(ModelConfig).validate_python(document)
        self._params = params
        self._model = restore(self._config, release.manifest.n_items, params)

    def recommend(
        self,
        history: Sequence[str],
        k: int,
        exclude: Sequence[str] = (),
        why: bool = False,
        moment: Mapping[str, Any] | None = None,
    ) -> Recommendations:
        """Return the k best items that are neither in the history nor excluded.

        Args:
            history: item ids, oldest first; may be empty.
            k: how many items.
            exclude: further item ids that are not wanted.
            why: also say what each item of the history adds to each score.
            moment: of the request, as `ContextConfig.moment` reads it; None: nothing is known of it.

        Raises:
            UnknownItem: the release's catalogue does not hold an id.
            ConfigError: the model knows no such moment.
        """
        catalog = self.release.catalog
        numbers, unwanted = catalog.numbers(history), catalog.numbers(exclude)
        at = moment_of(self._config, moment)
        moments = None if at is None else at[None]
        scores = score_all(self._model, histories_of([numbers], self._model.spec), moments=moments)[0]
        scores[numbers] = scores[unwanted] = -np.inf
        best = [int(i) for i in np.argsort(-scores, kind="stable")[:k] if np.isfinite(scores[i])]
        told: list[Explanation | None] = [None] * len(best)
        if why:
            told = [*explain(self._config, self._params, numbers, best, catalog.ids, catalog.attributes)]
        return Recommendations(
            tuple(catalog.titles[i] for i in numbers),
            tuple(
                Recommended(rank, catalog.ids[i], catalog.titles[i], catalog.attributes[i], float(scores[i]), reason)
                for rank, (i, reason) in enumerate(zip(best, told, strict=True), start=1)
            ),
        )


def recommend(
    release: Release,
    history: Sequence[str],
    k: int,
    student: bool = False,
    why: bool = False,
    moment: Mapping[str, Any] | None = None,
) -> Recommendations:
    """Ask a release once; arguments and errors as those of `Recommending`."""
    return Recommending(release, student).recommend(history, k, why=why, moment=moment)
