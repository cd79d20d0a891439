"""The parts of `python -m bench.tune`: problems, constants to try, compiling, writing."""
