"""The suite on a GPU: `python -m bench --device cuda`.

`supervisor` starts worker processes and gives them sections; `worker` runs a section's cases one
by one and answers with records. A case that crashes or hangs takes its worker along, and a new one
goes on with the next case.
"""
