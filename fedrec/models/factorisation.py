"""Matrix factorisation whose user vectors are solved on the device and never leave it."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import Batch, BatchSpec
from fedrec.models.configs import FactorisationConfig
from fedrec.models.layers import inner, normal_rows, rows
from fedrec.models.recommender import Recommender, copy_grown
from fedrec.models.squares import LeastSquares, Squares
from fedrec.random import Key


class Factorisation(LeastSquares):
    """Implicit-feedback factorisation: ``s_ui = u . v_i``, items V shared, u local.

    ``u = argmin sum_{i in H} (1 - u.v_i)^2 + alpha_0 sum_i (u.v_i)^2 + lambda |H| |u|^2``, in closed form.

    Source: Hu, Koren and Volinsky, ICDM 2008; iALS objective as in Rendle et al., RecSys 2022, eq. 1-4; partially local
    parameters as in Singhal et al., NeurIPS 2021 (Federated Reconstruction).
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"item"})
    local_names: ClassVar[frozenset[str]] = frozenset({"user"})
    table_name: ClassVar[str] = "item"
    vector_name: ClassVar[str] = "user"

    def __init__(self, config: FactorisationConfig, n_items: int, key: Key) -> None:
        """Draw the item vectors from `key`."""
        super().__init__()
        self.config: FactorisationConfig = config
        self.n_items, self.ridge = n_items, config.regularisation
        self.spec = BatchSpec("pairs", config.length, targets=config.targets, negatives=config.negatives)
        self.item = nn.Parameter(normal_rows(key.child("item"), 0, n_items, config.dim, config.dim**-0.5))

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Solve the user vector of each history; an empty history gets zeros."""
        c = self.config
        seen, weight = F.embedding(items, self.item), mask.to(self.item.dtype)
        total = torch.bmm(weight[:, None], seen)[:, 0]
        if not mask.all():
            seen = seen * weight[..., None]
        gram = c.unobserved_weight * self.item.T @ self.item
        ridge = (c.regularisation * weight.sum(-1).clamp(min=1.0))[:, None, None] * torch.eye(c.dim)
        lower, _ = torch.linalg.cholesky_ex(torch.baddbmm(gram + ridge, seen.transpose(1, 2), seen))
        return torch.cholesky_solve(total[..., None], lower)[..., 0]

    def score(
        self, users: Float[Tensor, "b d"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return ``u . v_i``."""
        if items is None:
            return users @ self.item.T
        return inner(rows(self.item, items), users)

    def score_into(self, users: Float[Tensor, "b d"], out: Float[Tensor, "b n"]) -> None:
        """Write the scores of the whole catalogue into `out`."""
        torch.mm(users, self.item.T, out=out)

    def local_start(self, batch: Batch) -> dict[str, Tensor]:
        """Return the solved user vectors."""
        with torch.no_grad():
            return {"user": self.encode(batch.inputs, batch.input_mask)}

    def squares(self, batch: Batch) -> Squares:
        """Return the iALS objective per observed interaction, with the unobserved part estimated from negatives.

        ``mean_t (1 - s_t)^2 + alpha_0 (n_items / |H|) mean_j s_j^2 + lambda |u|^2``.
        """
        n, observed = batch.negatives.shape[1], batch.target_mask.to(self.item.dtype)
        each = self.config.unobserved_weight * self.n_items / n
        unobserved = each / batch.input_mask.sum(-1, keepdim=True).clamp(min=1)
        weights = [observed / observed.sum(-1, keepdim=True).clamp(min=1.0), unobserved.expand(-1, n)]
        return Squares(torch.cat([batch.targets, batch.negatives], 1), F.pad(observed, (0, n)), torch.cat(weights, 1))

    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a copy with zero vectors for the new items: anything else would change everybody's user vector."""
        grown = type(self)(self.config, n_items, key)
        copy_grown(self, grown)
        with torch.no_grad():
            grown.item[self.n_items :] = 0.0
        return grown
