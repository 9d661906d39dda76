"""Attacks on a run of one's own, to set what is measured beside what is claimed."""
