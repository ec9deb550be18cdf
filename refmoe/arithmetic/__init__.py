"""What ``+``, a sum, a product and exp mean, and to what precision. No file here knows a model.

`exact` gives the same bits on every machine, `native` computes at a hardware dtype, `ball` proves error bounds, and
`enclosure` bounds what a legal implementation can compute. `arrays` has what they share, `formats` the binary formats.
Each arithmetic implements the protocol `refmoe.spec.interface.Ops`.
"""
