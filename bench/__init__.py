"""Benchmarks: each module that can be run measures figures against stated targets; `harness` is what they share."""
