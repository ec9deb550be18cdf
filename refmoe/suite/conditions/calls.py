# SPDX-License-Identifier: Apache-2.0
"""Conditions of the calls: the runs and their tokens."""

from __future__ import annotations

from itertools import pairwise

from refmoe.suite.conditions.observed import Observed, condition


@condition("calls", "T>1", "a call with several new tokens", "T>1")
def _several_tokens(seen: Observed) -> bool:
    return any(len(run.tokens) > 1 for run in seen.runs)


@condition("calls", "DECODE", "a call with one new token and cached ones", "DECODE")
def _decode(seen: Observed) -> bool:
    return any(run.op == "decode" for run in seen.runs)


@condition("calls", "CHUNK", "a call with several new tokens and more cached ones", "CHUNK")
def _chunk(seen: Observed) -> bool:
    return any(1 < len(run.tokens) <= run.past for run in seen.runs)


@condition("calls", "CUTS", "the same tokens in one call, in pieces, and one by one", "CHUNK", "DECODE")
def _cuts(seen: Observed) -> bool:
    cuts: dict[tuple[int, ...], set[str]] = {}
    for runs in seen.sequences.values():
        tokens = tuple(token for run in runs for token in run.tokens)
        kind = "whole" if len(runs) == 1 else "single" if all(len(run.tokens) == 1 for run in runs) else "pieces"
        cuts.setdefault(tokens, set()).add(kind)
    return any(len(kinds) == 3 for kinds in cuts.values())


@condition("calls", "BATCH", "several sequences whose calls alternate, each decoding", "BATCH")
def _batch(seen: Observed) -> bool:
    order = [run.sequence for run in seen.runs]
    decoding = {run.sequence for run in seen.runs if run.op == "decode"}
    changes = sum(a != b for a, b in pairwise(order))
    return len(decoding) > 1 and changes > len(seen.sequences)


@condition("calls", "RAGGED", "sequences that begin with different numbers of tokens", "BATCH-PAD-L", "BATCH-PAD-R")
def _ragged(seen: Observed) -> bool:
    return len(set(seen.lengths())) > 1


@condition("calls", "PACKED", "several sequences in one packed call", "BATCH")
def _packed(seen: Observed) -> bool:
    return sum(run.run.startswith("packed.") for run in seen.runs) > 1


@condition("calls", "SEQMIX", "a request that keeps a part of the cache of another and goes on differently", "SEQMIX")
def _shared_cache(seen: Observed) -> bool:
    for runs in seen.sequences.values():
        tokens: list[int] = []
        for run in runs:
            if run.past < len(tokens) and tokens[run.past] != run.tokens[0]:
                return True
            tokens = tokens[: run.past] + list(run.tokens)
    return False


SWEEP = {1, 2, 3, 9, 31, 32, 33, 63, 64, 65}


@condition("calls", "TSWEEP", "calls with 1, 2, 3, 9, 31, 32, 33, 63, 64 and 65 new tokens", "TSWEEP")
def _token_sweep(seen: Observed) -> bool:
    return {len(run.tokens) for run in seen.runs} >= SWEEP


@condition("calls", "EDGE-IDS", "tokens 0, 1, 2 and the last of the vocabulary")
def _edge_ids(seen: Observed) -> bool:
    return {token for run in seen.runs for token in run.tokens} >= {0, 1, 2, seen.config.vocab - 1}
