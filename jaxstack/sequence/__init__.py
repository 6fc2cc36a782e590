"""Sequence models: Kalman Linear Attention, other mixers behind one interface, and the scans they run on.

    scan            affine and Moebius recurrences (sequential, associative, chunked) with scalar adjoints
    scan_pallas     the whole Kalman filter as one GPU/TPU kernel, forward and backward
    mixer           what every sequence mixer offers: whole sequences, carried state, single steps
    kla             Kalman Linear Attention: filter, decoding step, flax layer (one filter step: kla_filter)
    kla_weights     layers to and from the layout of the released PyTorch package

Importing this package imports none of them.
"""
