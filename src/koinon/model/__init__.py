"""The model: shapes, layers, the private subspace of a stage, wire codecs, FLOPs. Knows nothing of networks.

Import from the modules: `config`, `layout` and `flops` are free of torch; `stage`, `codec`, `snapshot` and `monolith`
load it. This package file imports nothing.
"""
