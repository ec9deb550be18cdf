# SPDX-License-Identifier: Apache-2.0
"""Bugs of public kernels and routers, each dated and made again as a small faulty function that a contract finds."""
