# SPDX-License-Identifier: Apache-2.0
"""Evidence packages: the results of an engine as a folder that another machine can check without the engine.

layout       the names of the files, and how each is written
declared     the facts that only the author of a package knows: build, date, environment
given        the inputs of a package: results, traces, cases, policies
judged       the verdict on a trace that was kept, and the bounds on its values
epsilon      the bounds of all traces, per step and end to end, with their argument
certificates the certificates of the goldens, proven again
own          this refmoe and its suite
clauses      clause, code, tests, bugs, cases and verdicts
power        the known bugs that the run would have shown, and those that it shows to be absent
documents    all documents that follow from the inputs
pages        the documents as pages for people
materials    the bill of materials (CycloneDX)
statement    the statement about the test (in-toto), its envelope and its signature
write        write a package
verify       check one: everything that follows from the inputs is derived again
"""
