# SPDX-License-Identifier: Apache-2.0
"""The verifier: is this trace a legal result of the declared policy, and if not, where does it first go wrong?"""
