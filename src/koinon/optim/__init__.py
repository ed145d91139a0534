"""The optimizer: schedule, Muon and AdamW as pure updates of one tensor, ownership of tensors, reduce codecs.

Import from the modules: `config`, `schedule` and `ownership` are free of torch. This package file imports nothing.
"""
