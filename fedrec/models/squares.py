r"""Models whose loss is a sum of squares of inner products: their steps need neither autograd nor tables of their own.

.. math:: L = \sum_k w_k (v_k \cdot u - y_k)^2 + \lambda |u|^2

with rows :math:`v_k` of the item table, the client's own vector u, and for each row looked up a weight and a wanted
score. The gradient in a row is :math:`2 w_k (v_k \cdot u - y_k) u`: all rows that a step looks at move along one
vector, so a client's update of the table is one vector for each step and one number for each row looked up.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor

from fedrec.data.batches import Batch
from fedrec.models.layers import inner, rows
from fedrec.models.losses import masked_mean
from fedrec.models.recommender import Recommender, Taught


class Squares(NamedTuple):
    """The squares of one step of b people: `rows` [b, k] of the table, their `wanted` scores and `weights`, [b, k]."""

    rows: Tensor
    wanted: Tensor
    weights: Tensor


class LeastSquares(Recommender):
    """A recommender that trains one item table and one vector of the client's own on weighted squares.

    Attributes:
        table_name: name of the item table, the only parameter.
        vector_name: name of the client's own vector.
        ridge: lambda, the penalty on the vector.
    """

    table_name: ClassVar[str]
    vector_name: ClassVar[str]
    ridge: float

    @abstractmethod
    def squares(self, batch: Batch) -> Squares:
        """Return the squares that the loss adds up; a row may come more than once."""

    def candidate_scores(self, batch: Batch) -> Float[Tensor, "b k"]:
        """Return the scores of a batch's rows by the vector that this model starts from."""
        vector, table = self.local_start(batch)[self.vector_name], getattr(self, self.table_name)
        return inner(rows(table, self.squares(batch).rows), vector)

    def taught_loss(self, batch: Batch, local: Mapping[str, Tensor] | None, taught: Taught) -> Float[Tensor, " b"]:
        """Return the loss plus the mean square of what separates the scores of rows that count from the teacher's."""
        vector = (self.local_start(batch) if local is None else local)[self.vector_name]
        found = self.squares(batch)
        scores = inner(rows(getattr(self, self.table_name), found.rows), vector)
        unlike = masked_mean((scores - taught.scores) ** 2, found.weights > 0)
        return self.loss(batch, local) + taught.weight * unlike

    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return the sum of squares, in a form that autograd can follow: what closed steps are checked against."""
        vector = (self.local_start(batch) if local is None else local)[self.vector_name]
        table: Tensor = getattr(self, self.table_name)  # with an axis of people it is no parameter of the module
        found = self.squares(batch)
        scores = inner(rows(table, found.rows), vector)
        return (found.weights * (scores - found.wanted) ** 2).sum(-1) + self.ridge * (vector**2).sum(-1)
