# SPDX-License-Identifier: Apache-2.0
"""The matrix: each known bug on each case at each dtype, judged as if it were a foreign engine.

`outcomes` computes the matrix, and `file` reads and writes golden/matrix.json. `search` asks of another family of cases
only whether it kills every mutant by itself. `summary` counts kills, `dependencies`
has digests of the sources, and `changes` lists the runs that a change makes necessary. `surroundings` judges the
mutants of tokenizer, sampler and loss.
"""
