"""How nodes reach, recognise and believe each other: the transport seam, its two implementations, frames and passes.

`transport` is the seam; `iroh_transport` carries it over QUIC, `memory` is its twin in one process, under faults and a
virtual clock. Knows nothing of models, tensors' meaning, leases or money.
"""
