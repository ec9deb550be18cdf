# SPDX-License-Identifier: Apache-2.0
"""Arithmetics: each defines ``+``, sums, products and exp to a stated precision. No file here knows a model.

`exact` gives the same bits on every machine, `native` computes at a hardware dtype, `ball` proves error bounds, and
`enclosure` bounds the results of legal implementations. `arrays` is their common base, `formats` the binary formats.
Each arithmetic implements the protocol `refmoe.spec.interface.Ops`.
"""
