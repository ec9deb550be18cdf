"""Enclosures: for every value the interval and the spread of what a legal implementation of a policy can compute.

`array` has the arrays and their elementwise rules, `products` sums and matrix products, `functions` exp, softmax,
sigmoid and angles, `ops` puts them behind the spec's interface. The rules carry three numbers per element:

    mid       what exact arithmetic gives
    radius    a proven bound on how far any legal result can be from mid; infinite where there is none
    variance  of legal results around mid when roundings are independent: an upper size, never a bound

Everything is computed in binary64, whose own error is added to every radius.
"""
