"""Interactions, items, and how they are cut, cleaned and fetched."""
