# SPDX-License-Identifier: Apache-2.0
"""The routers of the literature: one paper per file, each a short pure function over `ops`.

All return the record in `record`. `capacity` and `dispatch` are their common parts, `losses` the auxiliary losses,
`statistics` the load of a routing. `family` lists the routers by name, `adapters` calls them with NumPy arrays.
"""
