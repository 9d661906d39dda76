"""What the server does against forgetting: it holds the shared model near the release that a slice began with.

Both ways depend on nothing that clients send, so they cost no privacy. A pull that is the same for everybody belongs
here: on a client it would be clipped, noised and downloaded, and with one local step the mean would be the same.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedrec.params import Array, Params


def pulled(
    delta: Params, params: Params, anchor: Params, strength: float, importance: Params | None = None
) -> dict[str, Array]:
    r"""Return the mean update with the gradient of a quadratic pull towards the anchor.

    .. math:: \Delta_k - \min(1, s f_k) (w_k - w^0_k), \qquad f_k = F_k / \bar F

    with f = 1 without an importance. Items that joined after the anchor are free.

    Args:
        delta: mean of new minus old over clients.
        params: the parameters w.
        anchor: those of the release before, with fewer item rows at most; empty: nothing is pulled.
        strength: weight s of the pull against the clients' loss.
        importance: F, of the anchor's shapes, not negative; None or empty: everything is alike.

    Source: Kirkpatrick et al., PNAS 2017, equation 3 (EWC), and its L2 variant; the importance is scaled to mean 1, so
    that a strength means the same in every model, and no step goes further than back to the anchor.
    """
    found = dict(delta)
    if strength:
        weights: dict[str, Array | float] = dict.fromkeys(anchor, strength)
        if importance:
            total = sum(float(value.sum(dtype=np.float64)) for value in importance.values())
            mean = total / sum(value.size for value in importance.values())
            scale = strength / mean if mean > 0 else 0.0
            weights = {name: np.minimum(1.0, scale * value) for name, value in importance.items()}
        for name, old in anchor.items():
            if name not in delta:  # frozen
                continue
            step = np.array(delta[name])
            step[_rows(old)] -= weights[name] * (params[name][_rows(old)] - old)
            found[name] = step.astype(delta[name].dtype)
    return found


def item_means(params: Params, anchor: Params, share: float, row_names: Collection[str]) -> dict[str, Array]:
    r"""Return the parameters with each old item's row averaged with its row of the release before.

    .. math:: v_i \leftarrow (1 - b_i) v_i + b_i v^0_i, \qquad b_i = \frac{share}{1 + |v_i - v^0_i|^2 / \sqrt d}

    so an item that hardly moved stays where it was, and one that moved far is let go.

    Args:
        params: after a round.
        anchor: the release before; empty: nothing is averaged.
        share: the largest weight of the old row.
        row_names: which parameters are item tables.

    Source: the item-wise temporal mean of Lim et al., CIKM 2025 (F3CRec), re-implemented from the idea.
    """
    found = dict(params)
    if share:
        for name in sorted(set(row_names) & anchor.keys()):
            old, new = anchor[name], params[name][: len(anchor[name])]
            flat = (new - old).reshape(len(old), -1).astype(np.float64)
            weight = share / (1.0 + np.square(flat).sum(1) / np.sqrt(flat.shape[1]))
            weight = weight.reshape(-1, *[1] * (old.ndim - 1))
            table = np.array(params[name])
            table[: len(old)] = ((1.0 - weight) * new + weight * old).astype(table.dtype)
            found[name] = table
    return found


def _rows(old: Array) -> slice | tuple[()]:
    return slice(len(old)) if old.ndim else ()
