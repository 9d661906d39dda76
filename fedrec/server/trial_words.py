"""How an experiment tests its releases, in words."""

from __future__ import annotations

from fedrec.config import BlockSplit, Experiment, LeaveOneOutSplit, ScheduleSplit


def protocol(experiment: Experiment) -> str:
    """Return how releases are tested, in the words that stand in the report."""
    split = experiment.split
    if isinstance(split, LeaveOneOutSplit):
        held = "last" if split.test == "test" else "second to last"
        how = (
            f"Leave-one-out: each person's {held} interaction is predicted from all before it; the last two of each "
            "person are never trained on."
        )
    elif isinstance(split, ScheduleSplit):
        how = (
            f"By the clock: a slice every {split.interval_seconds:,} s, each with what came since the last one. The "
            f"last {split.test:.0%} of an interval are tested before the next slice trains on them. "
            f"{_questions(experiment)}"
        )
    elif isinstance(split, BlockSplit):
        how = (
            f"{split.later + 1} blocks by time, each with interactions held back that are never trained on. Every "
            "release is tested on what every block held back; it knows all of a person's other interactions up to its "
            "own block, nothing later and nothing held back. Metrics of the table are those of its own block."
        )
    else:
        how = (
            f"Global time: a base of {split.base:.0%} of the interactions, {split.later} equal later slices, and a "
            f"tail of {split.holdout:.0%}. Each release is tested on the next slice (the last one on the tail) before "
            f"anything of it is trained on; popularity counts everything up to that time. {_questions(experiment)}"
        )
    return (
        f"{how} Every item of the catalogue at test time is ranked, except those that the person already had; ties "
        "count against the model. Training negatives are uniform over the catalogue, whatever is held out. Intervals "
        "are 95 % percentiles of a Poisson bootstrap over people, from sums alone. Local-only: each asked person "
        "trains the untrained model alone on all of their own earlier interactions."
    )


def _questions(experiment: Experiment) -> str:
    probes = experiment.evaluation.probes
    if probes is None:
        return "A person is asked once, before the slice, for everything that they do in it."
    return (
        f"A person is asked at up to {probes} places, evenly spread over their part of the slice, for the next item; "
        "their history up to there is known to the device, the model is not updated. A person's metrics are the mean "
        "over their places."
    )
