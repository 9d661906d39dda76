"""The contenders of `benchmarks.speed`, one small module each."""
