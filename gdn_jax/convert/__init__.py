"""Checkpoints of other programs, in and out: safetensors files only, tensor by tensor.

    tables.py    how a table names tensors, and what it says about a given model
    fla.py       flash-linear-attention's Hugging Face directories: one table an architecture, and its config.json
    lit.py       the state dict of the authors' release
    files.py     safetensors shards with their index
    exchange.py  import to a run or into memory, export from a run

To add an architecture: a table and its configuration in fla.py.
"""
