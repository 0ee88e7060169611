"""Checks of this project's hash, vocabulary projection and Engram layer against vectors of another implementation.

A directory of vectors holds a `manifest.json` and `.npz` files (format: tests/golden/README.md); `runner.run_cases`
goes through it. One file per kind of case. Integers must be equal, float64 agree within 1e-11, float32 within 2e-5.
"""
