"""Benches: every op against PyTorch. `python -m bench --help`."""
