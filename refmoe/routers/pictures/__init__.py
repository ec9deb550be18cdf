# SPDX-License-Identifier: Apache-2.0
"""Pictures of a routing: which tokens each expert gets, and how many.

`picture` makes the drawing, `svg` and `png` write it to a file, `terminal` prints it as text.
"""
