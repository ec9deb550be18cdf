"""What an operation means and where it runs.

Each module implements the protocol `refmoe.spec.interface.Ops`: `native` at a hardware dtype, `exact` with
bits that are the same on every machine. Nothing here knows the model.
"""
