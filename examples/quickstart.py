# SPDX-License-Identifier: Apache-2.0
"""The quickstart: an engine, a verdict, a mistake, its name. Run it anywhere: python quickstart.py"""

import tempfile
from pathlib import Path

from first_engine import Engine

import refmoe

model = refmoe.load("walking-skeleton")  # a small Mixtral that makes mistakes visible; or the folder of a checkpoint
tokens = [1, 31, 41, 59, 26, 53]

with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder, "model"), dtype="float32")  # an ordinary checkpoint, for any engine
    engine = Engine(Path(folder, "model"))

report = refmoe.verify(engine(tokens), model, tokens, policy="float32")
print(report)
assert report, "the engine is right"

engine.theta = 10000  # a common mistake: the default of a library, instead of config.json
report = refmoe.verify(engine(tokens), model, tokens, policy="float32")
print(report)
assert not report
assert report.first_wrong_step.tap == "layers.0.attention.q_rope"
print("explained by", report.explanations[0].name)
