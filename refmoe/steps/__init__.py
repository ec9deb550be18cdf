# SPDX-License-Identifier: Apache-2.0
"""The other statements of the model's steps: the same mathematics as `refmoe.spec`, for a purpose that needs more.

`rounding` has the cut points at which an engine may round. `grouped` and `native` are there for speed, `cuda` runs on a
GPU, and `sharded` on several ranks. `refmoe.spec` says which command runs which, and which test holds it to the spec.
"""
