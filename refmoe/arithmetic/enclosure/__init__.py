# SPDX-License-Identifier: Apache-2.0
"""Enclosures: for every value, the range and the spread of the results of legal implementations of a policy.

`array` has the arrays and their elementwise rules. `products` has sums and matrix products, over the sums of their
terms: in binary64 in `matrices`, and mostly in float32 in `narrow`. `functions` has exp, softmax, sigmoid and angles.
`refmoe.steps.enclosure_ops` puts them behind the interface of the spec.
The rules carry three numbers per element:

    mid       the result of exact arithmetic
    radius    a proven bound on the distance of any legal result from mid; infinite where there is none
    variance  of legal results around mid if roundings are independent: an upper estimate, never a bound

Every radius includes the error of its own computation, which is in binary64 except in `narrow`.
"""
