"""A thin training loop for preference alignment on `spo_kernels`: the command `spo-train`, and its parts to import.

`spo_train.align` is one training step, `spo_train.run` the loop, `spo_train.pair_data` the pairs, `spo_train.evaluate`
the win rate, `spo_train.models.llama` a small Llama; `spo_train.protocol` lists the methods that a model of your own
needs.
"""
