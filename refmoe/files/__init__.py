# SPDX-License-Identifier: Apache-2.0
"""Read JSON and safetensors files, and replace files whole or not at all."""
