"""Workload A in plain torch, as a tutorial would write it; it needs torch alone, so that every peer can use it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

N_ITEMS, DIM, PER_USER = 3_706, 32, 160
STEPS, BATCH, NEGATIVES = 5, 32, 32
RATE = 0.05
UNOBSERVED, REGULARISATION = 0.05, 0.05


class SmallClient(nn.Module):
    """The objective of fedrec's `Factorisation` for one person: items are shared, the user vector stays local."""

    def __init__(self, n_items: int = N_ITEMS, dim: int = DIM, n_seen: int = PER_USER) -> None:
        """Make room for `n_items` item vectors and one user vector; `n_seen` is the length of the person's history."""
        super().__init__()
        self.n_items, self.n_seen = n_items, n_seen
        self.item = nn.Embedding(n_items, dim)
        self.user = nn.Parameter(torch.full((dim,), 0.1))

    def loss(self, targets: Tensor, negatives: Tensor) -> Tensor:
        """Return the loss of one batch: targets [t] and negatives [n] are item numbers."""
        observed = (1.0 - self.item(targets) @ self.user).square().mean()
        unobserved = (self.item(negatives) @ self.user).square().mean() * (self.n_items / self.n_seen)
        loss: Tensor = observed + UNOBSERVED * unobserved + REGULARISATION * self.user.square().sum()
        return loss


def batches(history: Tensor, generator: torch.Generator, n_items: int = N_ITEMS) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw the targets and negatives of each local step of one person."""
    for _ in range(STEPS):
        targets = history[torch.randint(len(history), (BATCH,), generator=generator)]
        yield targets, torch.randint(n_items, (NEGATIVES,), generator=generator)


def train(client: SmallClient, drawn: Iterator[tuple[Tensor, Tensor]], rate: float = RATE) -> None:
    """Take one SGD step per batch: the local training of every plain contender."""
    optimizer = torch.optim.SGD(client.parameters(), lr=rate)
    for targets, negatives in drawn:
        optimizer.zero_grad()
        client.loss(targets, negatives).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def round_of(histories: Tensor, shared: Tensor, generator: torch.Generator) -> Tensor:
    """Return the item table after a round of federated averaging, one client after the other.

    Args:
        histories: [c, 160] item numbers.
        shared: [n_items, dim] item vectors.
        generator: draws the batches.
    """
    client, total = SmallClient(*shared.shape), torch.zeros_like(shared)
    for history in histories:
        with torch.no_grad():
            client.item.weight.copy_(shared)
            client.user.copy_(shared[history].mean(0))
        train(client, batches(history, generator, len(shared)))
        total += client.item.weight.detach() - shared
    return shared + total / len(histories)
