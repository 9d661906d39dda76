"""Rounds, aggregation, the lifelong stream and releases."""
