# SPDX-License-Identifier: Apache-2.0
"""The hand-made logits and settings of `golden/vectors/sampler.json`.

FOUR are the logarithms of 0.4, 0.3, 0.2 and 0.1 to multiples of 1/1024, so that the logits are exact and the
probabilities within 0.001 of those.
"""

from __future__ import annotations

from typing import NamedTuple

LOG = {"0.4": "-0.916015625", "0.3": "-1.2041015625", "0.2": "-1.609375", "0.1": "-2.302734375"}
FOUR = tuple(LOG.values())
SHUFFLED = tuple(LOG[p] for p in ("0.1", "0.4", "0.2", "0.3"))
BELOW_ONE = "0.99999988079071044921875"  # 1 - 2^-23


class Table(NamedTuple):
    """One vector before its expected values are computed. Numbers are decimals that are exact."""

    name: str
    why: str
    logits: tuple[str, ...]
    clauses: tuple[str, ...]
    temperature: str = "1"
    top_k: int | None = None
    top_p: str = "1"
    penalty: str = "1"
    seen: tuple[int, ...] = ()
    draws: tuple[str, ...] = ()
    bugs: tuple[str, ...] = ()


CROSSING, ONE, NEGATIVE = "samp-topp-excludes-crossing", "samp-topp-one-greedy", "samp-penalty-negative-logit"
QUARTERS = ("0", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875", BELOW_ONE)

TABLES = [
    Table("top-p-crossing", "Of 0.4, 0.3, 0.2, 0.1 and p = 0.8125 three tokens are kept: the one that crosses p is in.",
          FOUR, ("SAMPLE-6",), top_p="0.8125", draws=("0.25", "0.625", "0.875"), bugs=(CROSSING,)),
    Table("top-p-crossing-shuffled", "The same out of order: kept by falling probability, drawn by id.",
          SHUFFLED, ("SAMPLE-6", "SAMPLE-7"), top_p="0.8125", draws=("0.25", "0.5625", "0.875"), bugs=(CROSSING,)),
    Table("top-p-first-crosses", "The most probable token alone exceeds p; it is kept: never none.",
          FOUR, ("SAMPLE-6",), top_p="0.125", draws=("0", BELOW_ONE), bugs=(CROSSING,)),
    Table("top-p-equals-a-sum", "Two of four equal tokens sum to exactly p = 0.5: two are kept, the lower ids.",
          ("0", "0", "0", "0"), ("SAMPLE-6",), top_p="0.5", draws=("0", "0.25", "0.5", "0.75"), bugs=(ONE,)),
    Table("top-p-equals-a-sum-of-8", "Three of eight equal tokens sum to exactly p = 0.375.",
          ("2.5",) * 8, ("SAMPLE-6",), top_p="0.375", bugs=(ONE,)),
    Table("top-p-one", "p = 1 keeps every token that is not excluded, though 1 + exp(-50) rounds to 1.",
          ("0", "-50", "-60", "-inf"), ("SAMPLE-6",), top_p="1", draws=("0.5",), bugs=(ONE,)),
    Table("top-p-one-flat", "p = 1 on a flat distribution: a greedy choice would show.",
          SHUFFLED, ("SAMPLE-6", "SAMPLE-7"), draws=("0.0625", "0.25", "0.625", "0.875"), bugs=(ONE,)),
    Table("top-p-tie-at-the-edge", "Tokens 0, 2 and 3 tie and one of them is needed to reach p: the lowest id.",
          ("1", "2", "1", "1"), ("SAMPLE-6",), top_p="0.5625", draws=("0.125", "0.75"), bugs=(CROSSING,)),
    Table("top-k", "The two largest.", SHUFFLED, ("SAMPLE-5",), top_k=2, draws=("0.25", "0.75"), bugs=(ONE,)),
    Table("top-k-tie", "Exactly three are kept, though three tie for the third place: the lowest id.",
          ("3", "5", "3", "5", "3"), ("SAMPLE-5",), top_k=3, draws=("0.03125", "0.25", "0.75"), bugs=(ONE,)),
    Table("top-k-many-ties", "24 of 48 tokens tie and ten are kept: a sort that is not stable keeps others.",
          ("0.5", "1.5") * 24, ("SAMPLE-5",), top_k=10, top_p="0.4375", draws=("0.125", "0.9375")),
    Table("top-k-beyond", "k may exceed V.", ("1", "0", "-inf"), ("SAMPLE-5",), top_k=9, draws=("0.5",), bugs=(ONE,)),
    Table("top-k-one", "k = 1 is greedy, the lower id on ties.",
          ("-1", "4", "4"), ("SAMPLE-5",), top_k=1, draws=("0", BELOW_ONE)),
    Table("top-k-before-top-p", "After top-k the probabilities sum to 1 again: 4/7 reaches 0.5 where 0.4 does not.",
          FOUR, ("SAMPLE-1", "SAMPLE-6"), top_k=2, top_p="0.5", draws=("0.75",), bugs=(CROSSING,)),
    Table("temperature-below-1", "Halving squares the probabilities before top-p: two tokens reach 0.8125, not three.",
          FOUR, ("SAMPLE-1", "SAMPLE-4"), temperature="0.5", top_p="0.8125", draws=("0.5", "0.875"), bugs=(CROSSING,)),
    Table("temperature-above-1", "Temperature 4 flattens before top-p: all four are needed to reach 0.8125.",
          FOUR, ("SAMPLE-1", "SAMPLE-4"), temperature="4", top_p="0.8125", draws=("0.125", "0.9375"),
          bugs=(CROSSING,)),
    Table("temperature-large-logits", "exp(1000) overflows every format unless the largest is subtracted.",
          ("1000", "999", "-1000"), ("SAMPLE-4",), draws=("0.5", "0.875"), bugs=(ONE,)),
    Table("greedy", "Temperature 0 takes the largest logit.", ("-3", "0.5", "-1"), ("SAMPLE-2",), temperature="0"),
    Table("greedy-tie", "The lowest of the tied ids.", ("1", "7", "7", "7"), ("SAMPLE-2",), temperature="0"),
    Table("greedy-signed-zeros", "-0 and 0 are equal: a tie.", ("-1", "-0", "0"), ("SAMPLE-2",), temperature="0"),
    Table("greedy-excluded", "-inf is never chosen, and 0 is not its stand-in.",
          ("-inf", "-3", "-2", "-inf"), ("SAMPLE-2", "SAMPLE-8"), temperature="0"),
    Table("greedy-ignores-filters", "Greedy is the argmax, whatever top-k and top-p say.",
          ("1", "3", "2"), ("SAMPLE-1", "SAMPLE-2"), temperature="0", top_k=2, top_p="0.25"),
    Table("penalty-signs", "Positive is divided, negative multiplied, 0 and -inf stay; once for a token seen twice.",
          ("2", "-2", "0", "-inf", "6", "5"), ("SAMPLE-3",), temperature="0", penalty="2", seen=(0, 1, 2, 3, 4, 0, 4),
          bugs=(NEGATIVE,)),
    Table("penalty-negative", "A repeated token with a negative logit becomes less likely, so the other one wins.",
          ("-1", "-1.5", "-4"), ("SAMPLE-3",), temperature="0", penalty="2", seen=(0,), bugs=(NEGATIVE,)),
    Table("penalty-positive", "5 / 1.25 is below the 4.5 of a token not seen.",
          ("5", "-2", "4.5"), ("SAMPLE-3",), temperature="0", penalty="1.25", seen=(0, 1), bugs=(NEGATIVE,)),
    Table("penalty-below-1", "A penalty below 1 encourages.",
          ("1", "-2", "1.5"), ("SAMPLE-3",), temperature="0", penalty="0.5", seen=(1, 0), bugs=(NEGATIVE,)),
    Table("penalty-before-top-k", "The penalty changes which token top-k keeps.",
          ("4", "3", "-1"), ("SAMPLE-1", "SAMPLE-3"), top_k=1, penalty="2", seen=(0, 2), draws=("0.5",),
          bugs=(NEGATIVE,)),
    Table("penalty-before-temperature", "Penalised, cooled and cut, in that order.",
          ("2", "1.5", "-0.25", "1.25"), ("SAMPLE-1", "SAMPLE-3", "SAMPLE-4"), temperature="0.5", top_k=3,
          top_p="0.875", penalty="2", seen=(0, 2), draws=("0.25", "0.75"), bugs=(CROSSING, NEGATIVE)),
    Table("draw-by-id", "The draw inverts the cumulative distribution by id; u on a boundary takes the next token.",
          ("0", "0", "0", "0"), ("SAMPLE-7",), draws=QUARTERS, bugs=(ONE,)),
    Table("draw-around-excluded", "Excluded tokens first, between and last are never drawn, at u = 0 and near 1.",
          ("-inf", "1", "-inf", "1", "-inf"), ("SAMPLE-7",), draws=QUARTERS, bugs=(ONE,)),
]  # fmt: skip
