"""Headrace's HTTP server under load, on this machine: latencies, rates, errors, memory; beside its own Python API.

Bounded in streams, rate and time, and over loopback unless told otherwise. ``python -m benchmarks.load --help``.
"""
