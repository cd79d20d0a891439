"""One suite of cases per op, by the op's name."""
