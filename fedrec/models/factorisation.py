"""Matrix factorisation whose user vectors are solved on the device and never leave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import Batch, BatchSpec
from fedrec.models.configs import FactorisationConfig
from fedrec.models.layers import normal_rows, rows
from fedrec.models.losses import masked_mean
from fedrec.models.recommender import Recommender, copy_grown
from fedrec.random import Key


class Factorisation(Recommender):
    """Implicit-feedback factorisation: ``s_ui = u . v_i``, items V shared, u local.

    ``u = argmin sum_{i in H} (1 - u.v_i)^2 + alpha_0 sum_i (u.v_i)^2 + lambda |H| |u|^2``, in closed form.

    Source: Hu, Koren and Volinsky, ICDM 2008; iALS objective as in Rendle et al., RecSys 2022, eq. 1-4; partially local
    parameters as in Singhal et al., NeurIPS 2021 (Federated Reconstruction).
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"item"})
    local_names: ClassVar[frozenset[str]] = frozenset({"user"})

    def __init__(self, config: FactorisationConfig, n_items: int, key: Key) -> None:
        """Draw the item vectors from `key`."""
        super().__init__()
        self.config: FactorisationConfig = config
        self.n_items = n_items
        self.spec = BatchSpec("pairs", config.length, targets=config.targets, negatives=config.negatives)
        self.item = nn.Parameter(normal_rows(key.child("item"), 0, n_items, config.dim, config.dim**-0.5))

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Solve the user vector of each history; an empty history gets zeros."""
        c = self.config
        seen = F.embedding(items, self.item) * mask[..., None]
        count = mask.sum(-1).clamp(min=1).to(seen.dtype)
        gram = c.unobserved_weight * self.item.T @ self.item
        ridge = (c.regularisation * count)[:, None, None] * torch.eye(c.dim)
        users: Tensor = torch.linalg.solve(seen.transpose(1, 2) @ seen + gram + ridge, seen.sum(1))
        return users

    def score(
        self, users: Float[Tensor, "b d"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return ``u . v_i``."""
        if items is None:
            return users @ self.item.T
        return torch.bmm(rows(self.item, items), users[..., None])[..., 0]

    def score_into(self, users: Float[Tensor, "b d"], out: Float[Tensor, "b n"]) -> None:
        """Write the scores of the whole catalogue into `out`."""
        torch.mm(users, self.item.T, out=out)

    def local_start(self, batch: Batch) -> dict[str, Tensor]:
        """Return the solved user vectors."""
        return {"user": self.encode(batch.inputs, batch.input_mask).detach()}

    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return the iALS objective per observed interaction, with the unobserved part estimated from negatives."""
        user = (self.local_start(batch) if local is None else local)["user"]
        n_seen = batch.input_mask.sum(-1).clamp(min=1).to(user.dtype)
        n_targets = batch.targets.shape[1]
        scores = self.score(user, torch.cat([batch.targets, batch.negatives], 1))
        observed = masked_mean((1.0 - scores[:, :n_targets]) ** 2, batch.target_mask)
        unobserved = (scores[:, n_targets:] ** 2).mean(-1) * (self.n_items / n_seen)
        loss: Tensor = observed + self.config.unobserved_weight * unobserved
        return loss + self.config.regularisation * (user**2).sum(-1)

    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a copy with zero vectors for the new items: anything else would change everybody's user vector."""
        grown = type(self)(self.config, n_items, key)
        copy_grown(self, grown)
        with torch.no_grad():
            grown.item[self.n_items :] = 0.0
        return grown
