"""Sequence models: Kalman Linear Attention, other mixers behind one interface, and the scans they run on.

    scan            affine and Moebius recurrences (sequential, associative, chunked) with scalar adjoints
    scan_pallas     the whole Kalman filter as one GPU/TPU kernel, forward and backward
    mixer           what every sequence mixer offers: whole sequences, carried state, single steps
    kla             Kalman Linear Attention: filter, decoding step, flax layer (one filter step: kla_filter)
    attention       softmax attention with a cache of keys and values
    linear_attention  linear attention and gated linear attention (recurrent and chunked: gated_recurrence)
    mamba2          Mamba-2: one decay a head, in matrix products
    mamba           Mamba: selective diagonal state-space model
    delta           DeltaNet and Gated DeltaNet (the delta rule, recurrent and chunkwise: delta_rule)
    mingru          minGRU
    s5              S5: diagonal complex state-space model
    tasks           synthetic tasks drawn on the device: recall, copying, memory (state tracking: state_tasks)
    text            real text as bytes
    model           embedding, blocks of a mixer and an MLP, head; decoding and sampling
    trainer         training as a learner of the runner; data and sequence parallelism
    parallel        recurrences and the KLA filter with time spread over devices
    kla_weights     layers to and from the layout of the released PyTorch package

Importing this package imports none of them.
"""
