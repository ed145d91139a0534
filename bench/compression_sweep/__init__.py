"""Parts of `bench.compression`: corpora, wires to compare with, one training with several ends, rows, plan, picture."""
