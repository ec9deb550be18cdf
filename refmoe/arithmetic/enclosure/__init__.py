# SPDX-License-Identifier: Apache-2.0
"""Enclosures: for every value, the range and the spread of the results of legal implementations of a policy.

`array` has the arrays and their elementwise rules, `products` has sums and matrix products, and `functions` has exp,
softmax, sigmoid and angles. `refmoe.steps.enclosure_ops` puts them behind the interface of the spec.
The rules carry three numbers per element:

    mid       the result of exact arithmetic
    radius    a proven bound on the distance of any legal result from mid; infinite where there is none
    variance  of legal results around mid if roundings are independent: an upper estimate, never a bound

All three are computed in binary64, and every radius includes the error of that computation.
"""
