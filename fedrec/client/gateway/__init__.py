"""`fedrec gateway`: one Flower node that speaks for many light devices; see docs/gateway.md."""
