# SPDX-License-Identifier: Apache-2.0
"""Routers other than Mixtral's.

`literature` has the routers of eight papers, `pictures` draws a routing, and `contract` has laws for anybody's router.
"""
