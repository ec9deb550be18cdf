# SPDX-License-Identifier: Apache-2.0
"""The auditor's book: pages of the site that are made from the code, the goldens and the files of results.

`site` is what Sphinx calls. It writes the pages to ``docs/book/``, a folder that git ignores, and nothing of them is
typed by hand:

    spec_pages   the functions of `refmoe.spec`, a page for each step, with its clauses, taps and shapes
    equations    the code of a step as an equation
    example      the values of a step in one run of a golden case
    evidence     tests, known bugs, cases, engines and certificates
    markdown     the pieces of a page
    step_pages, bug_pages, case_pages, figure_pages, questions
                 the pages of each kind
    chapters     the pages of clauses and of their code, and the book as a whole

A page about a clause or a step has links to its evidence. So a reader needs no search, and no network.
"""
