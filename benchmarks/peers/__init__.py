"""Headrace beside other engines, on one checkpoint and one machine: ``python -m benchmarks.peers``.

Each peer is a module with a ``Peer`` (peer.py): it installs itself into an environment of its own, makes of the
checkpoint what it opens, and measures. Peers take turns, so that a noisy minute falls on all of them.
"""
