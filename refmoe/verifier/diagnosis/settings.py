# SPDX-License-Identifier: Apache-2.0
"""Settings of the config that an engine may ignore or take from elsewhere. Each is tried as a mutant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from refmoe.bugs.mutant import CONFIG, Mutant
from refmoe.spec.config import Config

EPSILONS = (1e-5, 1e-6, 1e-8, 0.0)
BASES = (1e4, 5e5, 1e6)
"""The defaults of `norm_eps` and `rope_theta` in models and libraries."""
NORMS = ("attention_norm", "moe_norm", "final_norm")


def other_settings(config: Config) -> Iterator[Mutant]:
    """A mutant of the config for each wrong setting."""
    if config.window is not None:
        yield _setting(
            "window ignored", "window", None, ("attention.probs",),
            f"Tokens are attended to as if the model had no sliding window; its config has one of {config.window}.",
            "give attention the window of the config: a query sees that many tokens, its own counted",
        )  # fmt: skip
    for field, values, touches in (
        ("norm_eps", EPSILONS, NORMS), ("rope_theta", BASES, ("attention.q_rope", "attention.k_rope")),
    ):  # fmt: skip
        right = getattr(config, field)
        for value in values:
            if value != right:
                yield _setting(
                    f"{field} {value:g}", field, value, touches,
                    f"The model runs with {field} {value:g}, not {right:g}.", f"take {field} from the config",
                )  # fmt: skip


def _setting(name: str, field: str, value: Any, touches: tuple[str, ...], about: str, fix: str) -> Mutant:
    return Mutant(
        id=name,
        about=about,
        kind="setting",
        changes=CONFIG,
        function=lambda config: replace(config, **{field: value}),
        touches=touches,
        fix=fix,
    )
