# SPDX-License-Identifier: Apache-2.0
"""Conformance of real engines: a line protocol, adapters, golden cases at every dtype, the scoreboard.

PROTOCOL.md specifies the protocol. Two sides speak it:

    protocol            the vocabulary and the messages, for both sides
    adapter, serve      the engine's side: needs no packages but NumPy, ml_dtypes and safetensors
    process, harness    the runner's side: a child process, and the requests to it
    guard, marked       the program between refmoe and a harness, which ends with it all that it has started
    run_case, conform   one case on a harness, and the whole run with its smoke test and verdicts
    observations        whose bits an engine has, and which policies are wider than a dtype's own
    results, known      the file of results, and the list of failures that are expected
    scoreboard          the results of several engines side by side
    adapters, capture   adapters of real engines, and hooks that record a trace
    scaffold            harnesses and a workflow to begin with
"""
