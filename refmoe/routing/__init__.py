"""Routing as the literature has it, around Mixtral's own router of `refmoe.spec.router`.

`docs/routers.md` walks through it. `record` is what every router returns, and `capacity` decides who is kept. The
routers, a paper each: `noisy_top_k`, `gshard` (and GLaM), `switch`, `st_moe`, `expert_choice`, `mixtral` and
`deepseek_v3`; before them, `stochastic_neurons`. `losses` holds what several share, `dispatch` moves the rows and
`statistics` counts them. `adapters` has plain functions of logits, `family` the routers by name; `picture`, `terminal`,
`svg` and `png` show a routing. `contract` tests any router.
"""
