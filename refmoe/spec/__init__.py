# SPDX-License-Identifier: Apache-2.0
"""The normative model: Mixtral as pure functions over `ops`.

Read in this order: `config`, `norm`, `rope`, `softmax`, `attention`, `router`, `experts`, `model`. `taps` names what
can be observed, and `interface` lists what the functions ask of an array and of `ops`. Every normative statement has a
clause id, such as ``NORM-1``, in the docstring of the function that states it.

Nothing here imports an array library or another part of refmoe, or is there for speed. The dimensions of shapes:

    T tokens in this call      S cached positions, this call included     D dim           L layers
    H query heads              K key/value heads                          d head_dim      V vocabulary
    E experts                  k experts per token                        F hidden_dim of an expert

Commands that need cut points or speed run another statement of the same steps. A test holds each to this one:

    statement                executed by                                              held to the spec by
    refmoe.spec              suite check, suite certify, suite emit                   tests/spec/test_model.py
    refmoe.steps.rounding    emit --policy, verify, conform, mutants matrix           tests/profiles/test_ideal_run.py
    refmoe.steps.sharded     mutants matrix --mutant of several ranks                 tests/bugs/test_sharding.py
    refmoe.steps.grouped     emit --checkpoint, suite check of a case of full size    tests/steps/test_grouped.py
    refmoe.steps.native      generate                                                 tests/steps/test_native.py
    refmoe.steps.cuda        any of these with --device cuda, at float32              tests/cuda/test_host.py

Sources: "Mixtral of Experts" (arXiv 2401.04088), "Mistral 7B" (arXiv 2310.06825); others where they are used.
"""
