"""
What the circuit of addition_toy.py does, read off its gates on all 10,000 problems (x, y), number 100 x + y.

The answer places are read from the right: units, tens, hundreds, and two zeros. Layer 0 can only read
digits. A layer above it can read what layer 0 has found: a carry.
"""

import torch

NAMES = ["x tens", "x units", "+", "y tens", "y units", "=", "answer 1", "answer 2", "hundreds",
         "tens", "units"]
HUNDREDS, TENS, UNITS = 8, 9, 10


def describe(gates):
    """In words, from gates (N, n_layer, n_head, 11, 11): who reads what, in how many problems."""
    lines, shares = [], gates.any(2).double().mean(0)  # (n_layer, 11, 11)
    for l, i in (shares >= 0.005).any(-1).nonzero().tolist():
        sources = sorted(zip(shares[l, i].tolist(), range(11)), reverse=True)
        reads = [f"{NAMES[j]} {share:.1%}" for share, j in sources if share >= 0.005]
        lines.append(f"layer {l}: {NAMES[i]} reads {', '.join(reads)}")
    return lines


def carry_table(gates):
    """In how many problems do the tens and the hundreds read another position above layer 0?

    {"tens <- units": {carry, no_carry: {reads, does_not}}, ...} from gates (10000, n_layer, n_head,
    11, 11). Layer 0 can only read digits; the carries, which it finds, can be read above it. Listed
    are the reads of lower digits, and others that occur in 0.5% of the problems. The carry is the
    one out of the units if the units are read or the tens read, else the one into the hundreds.
    """
    x, y = torch.arange(10000) // 100, torch.arange(10000) % 100
    into_tens, into_hundreds = x % 10 + y % 10 >= 10, x + y >= 100
    above, table = gates[:, 1:].flatten(1, 2).any(1), {}  # (10000, 11, 11)
    for i, j in ((i, j) for i in (TENS, HUNDREDS) for j in reversed(range(11)) if i != j):
        reads, lower_digit = above[:, i, j], j > i
        carry = into_tens if i == TENS or j == UNITS else into_hundreds
        if lower_digit or reads.double().mean() >= 0.005:
            table[f"{NAMES[i]} <- {NAMES[j]}"] = {
                key: {"reads": int((reads & rows).sum()), "does_not": int((~reads & rows).sum())}
                for key, rows in (("carry", carry), ("no_carry", ~carry))}
    return table
