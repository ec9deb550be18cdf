# SPDX-License-Identifier: Apache-2.0
"""The folder golden/ of this repository is packed as refmoe/goldens; pyproject.toml has everything else."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["refmoe*"]), "refmoe.goldens"], package_dir={"refmoe.goldens": "golden"})
