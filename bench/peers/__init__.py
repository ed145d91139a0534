"""Ways to train the same model on the same text, each run as a process of its own so that it can be metered whole.

    league           Koinon: 4 stages, one worker each, one control process
    plain            one process, plain PyTorch eager, gradients accumulated over microbatches
    torch_pipeline   torch.distributed.pipelining, 1F1B over gloo, a process per stage

    python -m bench.peers.NAME '{"size": "1M", "warmup": 3, "steps": 8}'

prints one JSON line, a `work.Outcome`. Beside them stand processes that other benchmarks start: `hosted`, `besiegers`.
"""
