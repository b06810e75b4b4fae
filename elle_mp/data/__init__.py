"""Text to batches: sources, tokenizer, indexed dataset, packing, sample order, memory, masking.

The way of the data: :mod:`sources` gives documents, :mod:`tokenizer` makes ids, :mod:`build` keeps them as
:mod:`indexed` files, :mod:`packing` cuts the stream into samples, :mod:`order` says which sample stands where
in which global batch, :mod:`memory` chooses what is kept of a finished domain, :mod:`masking` masks, and
:mod:`batches` joins all of it to tensors. Nothing here knows of ranks: a rank asks for its rows.
"""
