"""What a block of clients learnt, kept in the form that costs least until it is added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = dict[str, Tensor]

PIECE_BYTES = 1 << 20
"""Of what is only passed on: memory that is written and read again at once should be in the cache still."""


@dataclass(frozen=True)
class Products:
    """Differences of rows as sums of products: ``rows[s, c, k]`` moves by ``weights[s, c, k] * vectors[s, c]``.

    That is what steps on squares of inner products do to a table: in step s all rows of client c move along one vector.

    Attributes:
        rows: [s, c, k] row numbers; repeats add up.
        weights: [s, c, k] how far each of them moves.
        vectors: [s, c, d] along what.
        squares: [c] float64, the squared norm of each client's differences, repeats added up before.
    """

    rows: Tensor
    weights: Tensor
    vectors: Tensor
    squares: Tensor

    def take(self, which: Tensor | slice) -> Products:
        """Return the products of only these clients."""
        return Products(self.rows[:, which], self.weights[:, which], self.vectors[:, which], self.squares[which])

    def add_to(self, table: Tensor, factors: Tensor) -> None:
        """Add every client's differences times its factor, [c], to a whole table [n, d]."""
        weights = self.weights * factors[:, None]
        if len(table) > self.rows.numel():  # a product would pass over the table more often than over the differences
            parts = (self.rows.flatten(0, 1), weights.flatten(0, 1), self.vectors.flatten(0, 1))
            for rows, some, vectors in zip(*in_cache(*parts), strict=True):
                table.index_add_(0, rows.flatten(), (some[..., None] * vectors[:, None]).flatten(0, 1))
            return
        add_columns(table, self.rows.flatten(0, 1), weights.flatten(0, 1), self.vectors.flatten(0, 1))

    def whole(self, n_rows: int) -> Tensor:
        """Return the differences of whole tables, [c, n, d]."""
        c = self.rows.shape[1]
        tables = torch.zeros(c * n_rows, self.vectors.shape[-1])
        places = self.rows + torch.arange(0, c * n_rows, n_rows)[:, None]
        tables.index_add_(0, places.flatten(), (self.weights[..., None] * self.vectors[:, :, None]).flatten(0, 2))
        return tables.view(c, n_rows, -1)


@dataclass(frozen=True)
class Trained:
    """What c clients learnt: new minus old parameters, before clipping.

    Attributes:
        dense: name to [c, *shape] differences of whole parameters.
        rows: [c, r] numbers of the item rows that each client touched; padding is row 0 with a zero difference.
        sparse: name to [c, r, *shape] differences of those rows.
        loss: [c] loss of the first step, before anything was learnt.
        products: name to differences of rows that are not written out.
    """

    dense: Tensors
    rows: Tensor
    sparse: Tensors
    loss: Tensor
    products: Mapping[str, Products] = field(default_factory=dict)

    def norms(self) -> NDArray[np.float64]:
        """Return [c] L2 norms over all tensors."""
        parts = [*self.dense.values(), *self.sparse.values()]
        norms = [torch.linalg.vector_norm(part.flatten(1), dim=1).double() for part in parts]
        norms += [products.squares.sqrt() for products in self.products.values()]
        result: NDArray[np.float64] = torch.linalg.vector_norm(torch.stack(norms), dim=0).numpy()
        return result

    def shortened(self, bound: float | None, n_items: int) -> Trained:
        """Return the differences with every client's rows of item tables scaled down to a norm of `bound` at most.

        Raises:
            ValueError: differences of rows are not written out.
        """
        if bound is None:
            return self
        if self.products:
            raise ValueError("the rows of products are not written out: train apart")
        dense = {
            name: _within(part, bound) if part.dim() > 1 and part.shape[1] == n_items else part
            for name, part in self.dense.items()
        }
        return replace(self, dense=dense, sparse={name: _within(part, bound) for name, part in self.sparse.items()})

    def squared(self) -> Trained:
        """Return the squares of all differences; a row that a client touched stands once in `rows`: they are whole.

        Raises:
            ValueError: differences of rows are not written out, see `fedrec.client.lesson.Lesson.apart`.
        """
        if self.products:
            raise ValueError("the squares of products are not products: train apart")
        dense = {name: part.square() for name, part in self.dense.items()}
        return Trained(dense, self.rows, {name: part.square() for name, part in self.sparse.items()}, self.loss)

    def add_to(self, totals: Tensors, factors: NDArray[np.float32]) -> None:
        """Add ``factors @ differences`` to the whole-table `totals`; a client with factor 0 is left out, NaN or not."""
        weight = torch.from_numpy(factors)
        out = torch.from_numpy(factors == 0)
        for name, part in self.dense.items():
            flat = part.flatten(1)
            if out.any():
                flat = flat.masked_fill(out[:, None], 0.0)
            totals[name] += (weight @ flat).view(part.shape[1:])
        for name, part in self.sparse.items():
            if part.dim() == 3 and len(totals[name]) <= self.rows.numel() and not out.any():
                columns = weight[:, None].expand_as(self.rows).reshape(-1, 1)
                add_columns(totals[name], self.rows.reshape(-1, 1), columns, part.flatten(0, 1))
                continue
            for values, rows, w, gone in zip(*in_cache(part, self.rows, weight, out), strict=True):
                each = (-1, *[1] * (part.dim() - 1))
                weighted = values * w.view(each)
                if gone.any():
                    weighted.masked_fill_(gone.view(each), 0.0)
                totals[name].index_add_(0, rows.flatten(), weighted.flatten(0, 1))
        for name, products in self.products.items():
            kept = products.take(~out) if out.any() else products
            kept.add_to(totals[name], weight[~out])

    def alone(self, place: int) -> Trained:
        """Return what one client learnt."""
        one = slice(place, place + 1)
        return replace(
            self,
            dense={name: part[one] for name, part in self.dense.items()},
            rows=self.rows[one],
            sparse={name: part[one] for name, part in self.sparse.items()},
            loss=self.loss[one],
            products={name: products.take(one) for name, products in self.products.items()},
        )

    def whole(self, shared: Mapping[str, Tensor]) -> Tensors:
        """Return the differences of all parameters, written out: name to [c, *shape]."""
        found = dict(self.dense)
        for name, part in self.sparse.items():
            tables = torch.zeros(len(part), *shared[name].shape)
            places = torch.arange(len(part))[:, None].expand_as(self.rows)
            found[name] = tables.index_put_((places, self.rows), part, accumulate=True)
        return found | {name: products.whole(len(shared[name])) for name, products in self.products.items()}

    def client_params(self, shared: Tensors, place: int) -> Tensors:
        """Return the whole parameters that one client ended with."""
        changes = self.alone(place).whole(shared)
        return {name: value + changes[name][0] if name in changes else value.clone() for name, value in shared.items()}


def _within(part: Tensor, bound: float) -> Tensor:
    """Scale rows [c, r, *shape] down to a norm; what is not finite stays so, and is found later."""
    norms = torch.linalg.vector_norm(part.reshape(*part.shape[:2], -1), dim=2)
    factors = bound / norms.clamp_min(bound)
    shorter: Tensor = part * factors.view(*factors.shape, *[1] * (part.dim() - 2))
    return shorter


def add_columns(table: Tensor, rows: Tensor, weights: Tensor, vectors: Tensor) -> None:
    """Add ``weights[j, k] * vectors[j]`` to ``table[rows[j, k]]`` for all j and k, by one sparse product.

    Args:
        table: [n, d], changed in place; not much longer than there are rows, for the product passes over it as well.
        rows: [m, k] row numbers; repeats add up.
        weights: [m, k].
        vectors: [m, d].
    """
    from scipy.sparse import csc_array

    ends = np.arange(0, rows.numel() + 1, rows.shape[1])  # a column for each vector, and in it the weights of the rows
    columns = csc_array((weights.flatten().numpy(), rows.flatten().numpy(), ends), (len(table), len(rows)))
    table += torch.from_numpy(columns @ vectors.numpy())


def in_cache(*parts: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors [c, ...] along their first axis, so that a piece of the first one is about `PIECE_BYTES`."""
    n = max(1, PIECE_BYTES * len(parts[0]) // max(1, parts[0].nbytes))
    return [torch.split(part, n) for part in parts]
