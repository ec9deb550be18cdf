"""Conformance of real engines: a line protocol, adapters, the suite over cases and dtypes, the scoreboard.

`PROTOCOL.md` specifies the protocol. `adapter` and `serve` are the engine's side of it and need no more than NumPy,
ml_dtypes and safetensors; everything else here is the runner's side.
"""
