# SPDX-License-Identifier: Apache-2.0
"""The documents of the project: what they show is what the code prints."""
