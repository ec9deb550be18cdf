"""The matrix: each known bug on each case at each dtype, judged as if it were a foreign engine.

`outcomes` computes it, `file` is golden/matrix.json, `summary` says what it proves, `dependencies` tells what it was
computed from, and `changes` what a change makes necessary to compute again.
"""
