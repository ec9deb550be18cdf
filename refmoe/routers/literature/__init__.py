"""The routers of the literature: one paper per file, each a short pure function over `ops`.

`record` is what all of them return, `capacity` and `dispatch` what they share, `losses` the auxiliary losses.
"""
