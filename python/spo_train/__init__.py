"""A thin training loop for preference alignment on `spo_kernels`: the command `spo-train`, and its parts to import.

`spo_train.alignment` is a whole alignment, `spo_train.align` one training step, `spo_train.run` the loop,
`spo_train.pair_data` the pairs, `spo_train.evaluate` the win rate, `spo_train.models.llama` a small Llama, and
`spo_train.models.huggingface` models of transformers. `spo_train.protocol` lists the methods that a model of your own
needs.
"""
