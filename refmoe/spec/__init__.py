"""The normative model: Mixtral as pure functions over `ops`.

Read in this order: `config`, `norm`, `rope`, `softmax`, `attention`, `router`, `experts`, `model`. `taps` names what
can be observed, and `interface` lists what the functions ask of an array and of `ops`. Every normative statement has a
clause id, such as ``NORM-1``, in the docstring of the function that states it.

Nothing here imports an array library or another part of refmoe. Nothing here is there for speed. Shapes use one letter
per dimension:

    T tokens in this call      S cached positions, this call included     D dim           L layers
    H query heads              K key/value heads                          d head_dim      V vocabulary
    E experts                  k experts per token                        F hidden_dim of an expert

Sources: Jiang et al. 2024, "Mixtral of Experts" (arXiv 2401.04088); Jiang et al. 2023, "Mistral 7B"
(arXiv 2310.06825); others are named where they are used.
"""
