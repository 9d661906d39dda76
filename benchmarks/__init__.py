"""What fedrec claims, as commands: ``python -m benchmarks.NAME [--quick] [--json OUT]``."""
