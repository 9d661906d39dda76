"""Bounding what one person can contribute."""
