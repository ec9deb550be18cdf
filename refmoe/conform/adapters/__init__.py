"""Adapters of real engines: one module each, with a class `Adapter` as `refmoe.conform.adapter` describes it."""
